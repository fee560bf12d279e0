"""The view Models: the server's own numbers, loading with progress, refusals, embeddings, the log."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Page, Route, expect

from tests.page.conftest import violations
from tests.repeats import slow

LOADING = {
    "model": "other",
    "progress": 0.34,
    "doing": "reading the weights",
    "stage": "loading",
    "since": 0,
    "last_load_s": 9.2,
}


def region(page: Page, name: str) -> Any:
    return page.get_by_role("region", name=name, exact=True)


def rows(page: Page) -> Any:
    return page.get_by_role("table", name="Models").get_by_role("row")


def row(page: Page, name: str) -> Any:
    return rows(page).filter(has=page.get_by_text(name, exact=True))


def api(url: str, path: str, **body: Any) -> Any:
    answer = httpx2.post(url + path, json=body) if body else httpx2.get(url + path)
    return answer.raise_for_status().json()


def with_status(page: Page, change: Any) -> None:
    """Let the page see another state of the server: ``change`` alters what /status says."""

    def fulfil(route: Route) -> None:
        answer = route.fetch()
        said = answer.json()
        change(said)
        route.fulfill(response=answer, json=said)

    page.route("**/status", fulfil)


def test_what_is_shown_is_what_the_api_says(tiny, open_page):
    page = open_page(tiny, "/ui#models")
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    status = api(tiny, "/status")
    memory, server = region(page, "In memory"), region(page, "Server")
    expect(memory).to_contain_text("tiny-llama")
    expect(memory).to_contain_text(f"{status['resident']['max_model_len']:,} tokens of context")
    expect(memory).to_contain_text(f"loaded in {status['resident']['load_s']:.1f} s")
    expect(memory).to_contain_text("attention of 4 layers, verified")
    meter = memory.get_by_role("img", name=re.compile("^Memory: weights"))
    kilobytes = round(status["resident"]["bytes"] / 1000)
    expect(meter).to_have_accessible_name(re.compile(f"weights {kilobytes} kB"))
    expect(memory.get_by_role("img", name=re.compile("^Machine: this server"))).to_be_visible()
    expect(server).to_contain_text(f"Version{status['version']}")
    expect(server).to_contain_text(f"At once, at most{status['limits']['max_inflight']}")
    expect(server.get_by_role("img", name=re.compile("^Tokens a second"))).to_be_visible()
    expect(server.locator("canvas")).to_be_visible()
    listed = api(tiny, "/v1/models")["data"]
    expect(rows(page)).to_have_count(1 + len(listed))
    for model in listed:
        shown = row(page, model["id"])
        expect(shown).to_contain_text(f"{round(model['size_bytes'] / 1000)} kB")
        context = model.get("max_model_len", model["context_length"])  # Mamba's files say nothing
        expect(shown).to_contain_text(f"{context:,}" if context else "–")
        expect(shown).to_contain_text("chat · completion")
        expect(shown).to_contain_text("In memory" if model["loaded"] else "On disk")
    server.get_by_role("button", name="Show the request").click()
    dialog = page.get_by_role("dialog", name="The request behind this view")
    expect(dialog).to_contain_text(f"curl '{tiny}/status'")


def test_models_are_found_loaded_chatted_with_unloaded_and_the_log_says_so(tiny, open_page):
    page = open_page(tiny, "/ui#models")
    search = page.get_by_role("searchbox", name="Search models")
    search.fill("MAMBA")
    expect(rows(page)).to_have_count(2)
    search.fill("nothing like this")
    expect(page.get_by_text("No model has this")).to_be_visible()
    search.fill("")
    button = page.get_by_role("button", name="Load tiny-mamba", exact=True)
    button.focus()
    page.keyboard.press("Enter")
    memory = region(page, "In memory")
    expect(memory).to_contain_text("tiny-mamba")
    expect(memory).to_contain_text("no attention to show")
    expect(page.get_by_role("status")).to_have_text("tiny-mamba is ready")
    log = page.get_by_role("list", name="Loaded and unloaded").get_by_role("listitem")
    expect(log.first).to_contain_text(
        re.compile(r"tiny-mamba loaded in \d+\.\d s, in place of tiny-llama")
    )
    expect(row(page, "tiny-llama")).to_contain_text("On disk")
    page.get_by_role("button", name="Chat with tiny-mamba").click()
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("combobox", name="Model")).to_have_value("tiny-mamba")
    page.get_by_role("tab", name="Models").click()
    row(page, "tiny-mamba").get_by_role("button", name="Unload tiny-mamba").click()
    expect(memory).to_contain_text("NothingThe next message loads the model that is chosen.")
    expect(log.first).to_contain_text("tiny-mamba unloaded")
    assert api(tiny, "/status")["resident"] is None
    page.get_by_role("button", name="Load tiny-llama", exact=True).click()
    expect(memory).to_contain_text("tiny-llama")


def test_two_texts_are_compared_by_their_embeddings(tiny, open_page):
    page = open_page(tiny, "/ui#models", refusals=True)
    card = region(page, "How near are two texts?")
    expect(card.get_by_role("combobox", name="Embedding model")).to_have_value("tiny-llama")
    card.get_by_role("textbox", name="First text").fill("What is the capital of France?")
    second = card.get_by_role("textbox", name="Second text")
    second.fill("once the story")
    card.get_by_role("button", name="Compare").click()
    texts = ["What is the capital of France?", "once the story"]
    made = api(tiny, "/v1/embeddings", model="tiny-llama", input=texts)
    one, other = (each["embedding"] for each in made["data"])
    cosine = sum(map(float.__mul__, one, other)) / (math.hypot(*one) * math.hypot(*other))
    expect(card).to_contain_text(f"Similarity{cosine:.3f}")
    expect(card).to_contain_text(f"lists of 32 numbers; {made['usage']['prompt_tokens']} tokens")
    second.fill("What is the capital of France?")
    second.press("Tab")
    page.keyboard.press("Enter")
    expect(card).to_contain_text("Similarity1.000")
    expect(card).to_contain_text("nearly the same")
    second.fill("")
    card.get_by_role("button", name="Compare").click()
    expect(card.get_by_role("alert")).to_be_visible()
    card.get_by_role("button", name="Show the request").click()
    dialog = page.get_by_role("dialog", name="The request behind this view")
    expect(dialog).to_contain_text('"model": "tiny-llama"')


def test_a_load_shows_how_far_it_is_or_that_nobody_knows(scripted, open_page):
    page = open_page(scripted, None)
    loading = dict(LOADING)
    with_status(page, lambda said: said.update(loading=loading, queued={"other": 2}))
    page.goto("/ui#models")
    card, bar = region(page, "Loading"), page.get_by_role("progressbar", name="Loading other")
    expect(bar).to_have_attribute("aria-valuenow", "34")
    expect(card).to_contain_text("Reading the weights34 %")
    expect(card).to_contain_text("Last time9 s")
    expect(card).to_contain_text("Waiting for it2")
    expect(card).to_contain_text("In memory beforescripted")
    expect(row(page, "other")).to_contain_text("Loading")
    expect(page.get_by_role("button", name="Load other")).to_have_count(0)
    handle = bar.element_handle()
    loading["progress"] = 0.0
    expect(bar).not_to_have_attribute("aria-valuenow", re.compile(".*"))
    loading.update(stage="waiting", progress=1.0, doing="ready")
    expect(card).to_contain_text("Waiting for its turn")
    expect(card).to_contain_text("scripted finishes its answers first.")
    assert handle.evaluate("(bar) => bar.isConnected")  # the same card all the time


def test_a_load_that_waits_or_downloads_can_be_cancelled(scripted, open_page):
    page = open_page(scripted, None)
    loading = {**LOADING, "stage": "preparing", "doing": "downloading"}
    with_status(page, lambda said: said.update(loading=dict(loading) if loading else None))
    cancelled: list[str] = []

    def cancel(route: Route) -> None:
        cancelled.append(route.request.method)
        loading.clear()
        route.fulfill(json={"message": "Model 'other' unloaded successfully"})

    page.route("**/models/other/unload", cancel)
    page.goto("/ui#models")
    expect(region(page, "Loading")).to_contain_text("Downloading34 %")
    button = page.get_by_role("button", name="Cancel loading other")
    loading["stage"] = "loading"
    expect(button).to_be_hidden()
    loading["stage"] = "waiting"
    button.click()
    expect(region(page, "In memory")).to_contain_text("scripted")
    expect(page.get_by_role("status")).to_have_text("The load of other is cancelled")
    assert cancelled == ["DELETE"]


def test_what_failed_is_red_says_why_and_can_be_tried_again(scripted, open_page):
    page = open_page(scripted, None)
    reason = "<b>broken</b> weights"
    with_status(page, lambda said: said.update(failed={"other": reason}))
    page.goto("/ui#models")
    failed = row(page, "other")
    expect(failed).to_contain_text("Failed")
    expect(failed).to_contain_text(reason)
    expect(failed.get_by_role("button", name="Load other")).to_have_text("Try again")
    page.unroute_all(behavior="wait")
    with_status(page, lambda said: said.update(resident=None, state="empty", failed={}))
    expect(region(page, "In memory")).to_contain_text("Nothing")


def test_who_may_not_change_models_sees_no_button_for_it(scripted, open_page):
    page = open_page(scripted, None, refusals=True)
    refused = {"detail": "GET /status needs an API key of the scope admin"}
    page.route("**/status", lambda route: route.fulfill(status=403, json=refused))
    page.goto("/ui#models")
    expect(page.get_by_text("need a key of the scope admin")).to_be_visible()
    expect(region(page, "In memory")).to_contain_text("scripted")
    expect(page.get_by_role("button", name="Chat with scripted")).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("^(Load|Unload) "))).to_have_count(0)
    expect(region(page, "Loaded and unloaded")).to_have_count(0)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, {"detail": "This needs an API key of the scope admin"}),
        (503, {"error": {"message": "Model 'other' needs 9.0 GiB of memory", "code": "x"}}),
        (429, {"error": "Too much is waiting", "code": "queue_full"}),
    ],
)
def test_a_refused_load_is_told_in_the_servers_words(scripted, open_page, status, body):
    page = open_page(scripted, None, refusals=True)
    page.route("**/models/other/load", lambda route: route.fulfill(status=status, json=body))
    page.goto("/ui#models")
    page.get_by_role("button", name="Load other", exact=True).click()
    error = body.get("error", body.get("detail"))
    message = error["message"] if isinstance(error, dict) else error
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(region(page, "In memory")).to_contain_text("scripted")


def test_unloading_asks_first_while_an_answer_is_written(scripted, open_page):
    page = open_page(scripted)
    page.get_by_role("textbox", name="Message", exact=True).fill("forever and ")
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="Model")).to_contain_text("and and")
    page.get_by_role("tab", name="Models").click()
    expect(region(page, "Server")).to_contain_text("Being written1")
    expect(region(page, "Server")).to_contain_text(re.compile(r"Tokens a second[1-9]"))
    page.get_by_role("button", name="Unload scripted").first.click()
    dialog = page.get_by_role("dialog", name="Unload scripted?")
    expect(dialog).to_contain_text("An answer is being written. It is finished first")
    dialog.get_by_role("button", name="Cancel").click()
    expect(region(page, "In memory")).to_contain_text("scripted")
    page.get_by_role("button", name="Unload scripted").first.click()
    dialog.get_by_role("button", name="Unload", exact=True).click()
    expect(region(page, "In memory")).to_contain_text("It finishes its answers and then goes.")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("tab", name="Models").click()
    expect(region(page, "In memory")).to_contain_text("Nothing")
    page.get_by_role("button", name="Load scripted", exact=True).click()
    expect(region(page, "In memory")).to_contain_text("scripted")


def many(route: Route) -> None:
    """Beside the server's own models such as the Hub has, one of which has a hostile name."""
    answer = route.fetch()
    said = answer.json()
    more = {"loaded": False, "local": False, "owned_by": "huggingface", "size_bytes": None}
    more |= {"capabilities": ["chat", "tools", "fill-in-the-middle"], "context_length": None}
    names = ["<img src=x onerror=alert(1)>", *(f"hub/model-{number}" for number in range(20))]
    said["data"] += [{"id": name, **more} for name in names]
    never = {"servable": False, "reason": "it writes no text", "capabilities": []}
    said["data"].append({"id": "hub/encoder", **more, **never})
    route.fulfill(response=answer, json=said)


@pytest.mark.parametrize(("scheme", "width"), [*slow(("light", 1280)), ("dark", 390)])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(scripted, open_page, scheme, width):
    page = open_page(scripted, None, scheme=scheme, size=(width, 844), bypass_csp=True)
    page.route("**/v1/models", many)
    page.goto("/ui#models")
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="Show 23 more that are not here yet").click()
    expect(page.get_by_role("button", name="Load other")).to_be_focused()
    expect(page.get_by_role("button", name="Load <img src=x onerror=alert(1)>")).to_be_visible()
    expect(row(page, "hub/model-3")).to_contain_text("chat · tools · fills gaps")
    expect(row(page, "hub/encoder")).to_contain_text("it writes no text")
    expect(row(page, "hub/encoder").get_by_role("button")).to_have_count(0)
    assert violations(page) == []
    for element in ("document.scrollingElement", "document.querySelector('#view-models .scroll')"):
        assert page.evaluate(f"{element}.scrollWidth") <= width
    with_status(page, lambda said: said.update(loading=LOADING, failed={"other": "no"}))
    expect(page.get_by_role("progressbar")).to_be_visible()
    assert violations(page) == []


def test_the_last_state_stays_while_the_server_does_not_answer(scripted, open_page):
    page = open_page(scripted, None, refusals=True)
    page.route("**/status", lambda route: route.abort())
    page.goto("/ui#models")
    expect(page.get_by_role("heading", name="The server does not answer")).to_be_visible()
    page.unroute_all(behavior="wait")
    expect(region(page, "In memory")).to_contain_text("scripted")
    page.route("**/status", lambda route: route.abort())
    expect(page.get_by_role("button", name=re.compile("^No connection"))).to_be_visible()
    expect(region(page, "In memory")).to_contain_text("scripted")
    assert json.loads(page.evaluate("JSON.stringify(location.hash)")) == "#models"
