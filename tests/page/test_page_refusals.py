"""Refusals and waiting: every one in words, where the answer would be, with a way on; the composer stays free."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from tests.page.chatting import box, model_turn, send, stored

CHATS = "**/v1/chat/completions"


def refuse(page: Page, status: int, body: Any, **headers: str) -> None:
    """Answer the next chats so."""
    text = body if isinstance(body, str) else json.dumps(body)
    kind = "text/html" if isinstance(body, str) else "application/json"
    headers |= {"content-type": kind}
    page.route(CHATS, lambda route: route.fulfill(status=status, headers=headers, body=text))


def openai(message: str, code: str | None) -> dict[str, Any]:
    return {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    }


def ask(page: Page, text: str) -> None:
    page.locator("html[data-ready]").wait_for()
    box(page).fill(text)
    box(page).press("Enter")


REFUSALS = [
    (
        403,
        openai("This key is for others.", "insufficient_permissions"),
        "This key may not do that",
        "Enter a key",
    ),
    (404, openai("No model <b>x</b>.", "model_not_found"), "The model is not there", "Show models"),
    (
        400,
        openai("9000 tokens are too many.", "context_length_exceeded"),
        "The conversation is too long for this model",
        "New chat from the last message",
    ),
    (
        400,
        openai("'temperature' must be a number", None),
        "The request was refused",
        "Open the settings",
    ),
    (
        413,
        openai("Too large.", "payload_too_large"),
        "The message is too long",
        "New chat from the last message",
    ),
    (429, openai("Too often.", "rate_limited"), "Too many requests", "Try again"),
    (429, openai("All places are taken.", "queue_full"), "Too many are waiting", "Try again"),
    (
        503,
        openai("gpt2 is being loaded.", "model_loading"),
        "The model cannot answer now",
        "Show models",
    ),
    (
        507,
        openai("It needs 9 GB.", "insufficient_memory"),
        "The model cannot answer now",
        "Show models",
    ),
    (500, openai("The engine failed.", "engine_failed"), "The server made a mistake", "Try again"),
    (502, "<html>Bad gateway</html>", "The server made a mistake", "Try again"),
    (422, {"detail": "no head 9"}, "The request was refused", "Try again"),
    (400, {"error": "plain words", "code": "x"}, "The request was refused", "Try again"),
]


def test_every_refusal_is_told_in_words_with_a_way_on_and_stays(scripted, open_page):
    page = open_page(scripted, refusals=True)
    for status, body, title, way in REFUSALS:
        page.get_by_role("button", name="New chat", exact=True).click()
        refuse(page, status, body)
        ask(page, "hello")
        card = model_turn(page).get_by_role("alert")
        expect(card.get_by_text(title, exact=True)).to_be_visible()
        error = body if isinstance(body, str) else body.get("error", body.get("detail"))
        sentence = (
            error["message"]
            if isinstance(error, dict)
            else error
            if not isinstance(body, str)
            else "The server answered 502."
        )
        expect(card).to_contain_text(sentence)
        expect(card.get_by_role("button", name=way)).to_be_visible()
        expect(card.get_by_role("button", name="Try again")).to_be_visible()
        expect(box(page)).to_be_enabled()
        page.unroute(CHATS)
    page.reload()
    expect(model_turn(page).get_by_role("alert")).to_contain_text("plain words")
    model_turn(page).get_by_role("button", name="Try again").click()
    expect(model_turn(page)).to_contain_text("hello")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("group", name="Versions")).to_have_count(0)


def test_ways_on_lead_somewhere(scripted, open_page):
    page = open_page(scripted, refusals=True)
    refuse(page, 400, openai("Too long.", "context_length_exceeded"))
    ask(page, "a long\nmessage")
    page.get_by_role("button", name="New chat from the last message").click()
    expect(page.get_by_role("article")).to_have_count(0)
    expect(box(page)).to_have_value("a long\nmessage")
    expect(box(page)).to_be_focused()
    page.unroute(CHATS)
    refuse(page, 404, openai("No such model.", "model_not_found"))
    box(page).press("Enter")
    page.get_by_role("button", name="Show models").click()
    expect(page.get_by_role("tabpanel", name="Models")).to_be_visible()
    page.get_by_role("tab", name="Chat").click()
    page.unroute(CHATS)
    refuse(page, 403, openai("No.", "insufficient_permissions"))
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("button", name="Enter a key").click()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()


def test_retry_after_is_counted_down(scripted, open_page):
    page = open_page(scripted, None, refusals=True)
    page.clock.install()
    page.goto("/ui")
    refuse(page, 429, openai("Too often.", "rate_limited"), **{"retry-after": "7"})
    ask(page, "hello")
    card = model_turn(page).get_by_role("alert")
    expect(card).to_contain_text("You can try again in 7 s.")
    page.clock.fast_forward(3000)
    expect(card).to_contain_text(re.compile("You can try again in [34] s."))
    page.clock.fast_forward(5000)
    expect(card).not_to_contain_text("You can try again in")
    expect(card.get_by_role("button", name="Try again")).to_be_enabled()


@pytest.mark.parametrize(
    ("ending", "title", "sentence"),
    [
        ("", "The connection is lost", "The answer broke off"),
        (
            'data: {"error": {"message": "A step failed.", "code": "engine_failed"}}\n\n',
            "The server made a mistake",
            "A step failed.",
        ),
    ],
    ids=["without its end", "an error in it"],
)
def test_what_was_written_stays_where_a_stream_fails(scripted, open_page, ending, title, sentence):
    page = open_page(scripted)
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "half a sen"}}]})
    page.route(
        CHATS,
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {chunk}\n\n{ending}"
        ),
    )
    ask(page, "hello")
    card = model_turn(page).get_by_role("alert")
    expect(card).to_contain_text(title)
    expect(card).to_contain_text(sentence)
    expect(model_turn(page).locator(".prose")).to_have_text("half a sen")
    page.unroute(CHATS)
    card.get_by_role("button", name="Try again").click()
    expect(model_turn(page).locator(".prose")).to_have_text("hello")
    expect(page.get_by_role("group", name="Versions")).to_contain_text("2 / 2")


def test_a_server_that_is_gone_is_noticed_asked_again_and_welcomed_back(scripted, open_page):
    page = open_page(scripted, refusals=True)
    expect(page.get_by_role("heading", name="scripted is ready.")).to_be_visible()
    page.route("**/*", lambda route: route.abort("connectionrefused"))
    box(page).fill("a draft")
    line = page.get_by_role("navigation", name="Conversations").get_by_role(
        "button", name=re.compile("No connection")
    )
    expect(line).to_be_visible()
    expect(page.get_by_role("heading", name="The server does not answer.")).to_be_visible()
    box(page).press("Enter")
    card = model_turn(page).get_by_role("alert")
    expect(card).to_contain_text("The connection is lost")
    expect(card).to_contain_text("The server does not answer. It may be stopped or restarting.")
    box(page).fill("the next draft")
    page.unroute("**/*")
    expect(
        page.get_by_role("navigation", name="Conversations").get_by_role(
            "button", name=re.compile("^Ready")
        )
    ).to_be_visible()
    card.get_by_role("button", name="Try again").click()
    expect(model_turn(page)).to_contain_text("a draft")
    expect(box(page)).to_have_value("the next draft")
    page.context.set_offline(True)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(model_turn(page).get_by_role("alert")).to_contain_text("This computer is offline.")


RESIDENT = {
    "model": "scripted",
    "running": 32,
    "waiting": 4,
    "device": "cpu",
    "bytes": 1000,
    "draining": False,
}
LOADING = {"model": "gpt2", "progress": 0.34, "doing": "downloading", "stage": "preparing"}
WAITING = [
    ({"resident": RESIDENT}, "Waiting for a place: 32 answers are being written, 4 wait"),
    ({"resident": RESIDENT, "loading": LOADING}, "gpt2 is being loaded: downloading, 34 %"),
    (
        {"resident": RESIDENT, "loading": LOADING | {"stage": "waiting", "progress": 0.0}},
        "gpt2 is next; scripted finishes its answers first",
    ),
    (
        {
            "loading": LOADING
            | {"stage": "loading", "progress": 0.0, "doing": "loading", "last_load_s": 9.4}
        },
        "gpt2 is being loaded, which took 9 s last time",
    ),
    ({"resident": RESIDENT | {"running": 0, "waiting": 0}}, "Reading your message"),
]


def test_what_it_waits_for_is_true_and_has_seconds_when_it_takes_long(scripted, open_page):
    page = open_page(scripted, None)
    page.clock.install()
    page.goto("/ui")
    page.clock.run_for(1000)
    shown: dict[str, Any] = {}

    def status(route: Route) -> None:
        route.fulfill(
            json={"ready": True, "resident": None, "loading": None, "queued": {}, "failed": {}}
            | shown
        )

    held: list[Route] = []
    page.route(CHATS, lambda route: held.append(route))
    page.route("**/status", status)
    shown.update(WAITING[0][0])
    ask(page, "hello")
    for answer, sentence in WAITING:
        shown.clear()
        shown.update(answer)
        page.clock.run_for(1500)
        expect(model_turn(page)).to_contain_text(sentence)
    page.clock.run_for(10_000)
    expect(model_turn(page)).to_contain_text(re.compile(r"Reading your message \(1\d s\)"))
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.unroute("**/status")
    page.get_by_role("button", name="Stop").click()
    page.clock.run_for(2000)
    expect(page.get_by_text("You stopped it here.")).to_be_visible()
    for route in held:
        route.abort()


def test_words_that_came_while_the_page_rested_are_drawn_while_the_model_pauses(
    scripted, open_page
):
    page = open_page(scripted, None)
    page.add_init_script(  # each drawing takes so long that the page rests for two seconds after it
        """const parse = DOMParser.prototype.parseFromString;
        DOMParser.prototype.parseFromString = function (...values) {
          for (const begun = performance.now(); performance.now() - begun < 400;);
          return parse.apply(this, values);
        };"""
    )
    page.goto("/ui")
    ask(page, "pausing a|bc|d")
    expect(model_turn(page)).to_contain_text("a")
    httpx.post(f"{scripted}/go", timeout=30)
    expect(model_turn(page)).to_contain_text("abc")
    expect(
        model_turn(page).get_by_role("button", name="Surprisal of 3 tokens: look inside")
    ).to_be_visible()
    httpx.post(f"{scripted}/go", timeout=30)
    expect(model_turn(page)).to_contain_text("abcd")


def test_an_answer_that_a_reload_cut_off_says_so(scripted, open_page):
    page = open_page(scripted)
    ask(page, "pausing abc|def")
    expect(model_turn(page)).to_contain_text("abc")
    while stored(page)[-1]["text"] != "abc":  # which is soon
        page.wait_for_timeout(50)
    page.reload()
    expect(model_turn(page)).to_contain_text("abc")
    expect(page.get_by_text("It was not finished.")).to_be_visible()
    httpx.post(f"{scripted}/go", timeout=30)
    model_turn(page).get_by_role("button", name="Regenerate").click()
    expect(model_turn(page)).to_contain_text("abc")
    httpx.post(f"{scripted}/go", timeout=30)
    expect(model_turn(page)).to_contain_text("abcdef")


def test_another_model_is_announced_loaded_and_answers(scripted, open_page):
    page = open_page(scripted)
    page.get_by_role("combobox", name="Model").select_option("other")
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("other is loaded with your next message, in place of scripted")
    send(page, "hello")
    expect(model_turn(page)).to_contain_text("other")
    expect(notice).to_have_count(0)
    page.get_by_role("combobox", name="Model").select_option("scripted")
    expect(notice).to_contain_text("scripted is loaded with your next message, in place of other")
    page.get_by_role("button", name="Load now").click()
    page.get_by_role("button", name="New chat", exact=True).click()
    expect(page.get_by_role("heading", name="scripted is ready.")).to_be_visible()


def test_a_view_that_could_not_be_fetched_is_fetched_when_the_server_is_back(scripted, open_page):
    page = open_page(scripted, refusals=True)
    expect(page.get_by_role("heading", name="scripted is ready.")).to_be_visible()
    page.route("**/js/inside/**", lambda route: route.abort())
    page.get_by_role("tab", name="Inside").click()
    expect(page.get_by_role("alert")).to_contain_text("This view could not be fetched")
    page.unroute("**/js/inside/**")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("tab", name="Inside").click()
    expect(page.get_by_role("heading", name="Nothing to look into yet")).to_be_visible()
