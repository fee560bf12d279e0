"""Inside, when something is other than usual: no attention, no trace, no server, another model, text that means harm."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from playwright.sync_api import Route, expect

from tests.page.conftest import violations
from tests.page.inside import ask, begin, choose, completion, inspect, look_inside, rows, token

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
LONG = "What is the capital of France and of the story that is told once more of Paris"


@pytest.fixture
def dialogs(open_page):
    """No script of a model's, a user's or a file's may run: each would open a dialog."""
    opened: list[str] = []
    yield opened
    assert opened == []


def watch(page, dialogs):
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    return page


def use_model(page, name: str) -> None:
    page.get_by_role("combobox", name="Model").select_option(name)
    page.get_by_role("button", name="Dismiss").click()


def menu(page, name: str) -> None:
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_role("menuitem", name=name).click()


def test_an_answer_without_a_trace_is_looked_into_by_its_token_ids(tiny, open_page):
    page = open_page(tiny, None)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=json.dumps(json.loads(route.request.post_data) | {"trace": None})
        ),
    )
    begin(page)
    ask(page, "What is it")
    look_inside(page)
    expect(page.get_by_text("Written without a trace")).to_be_visible()
    expect(page.get_by_role("list", name="Candidates")).to_be_hidden()
    page.get_by_role("button", name="Look inside", exact=True).click()
    expect(page.get_by_text("Written without a trace")).to_be_hidden()
    prompt, written = completion(tiny, "What is it", "tiny-llama")
    table = inspect(
        tiny, "tokens", model="tiny-llama", token_ids=[*prompt, *written], logprobs=True, topk=10
    )
    choose(page, len(prompt) + 1)
    expect(page.locator("dl.facts dd").nth(1)).to_have_text(
        f"{table['surprisal'][len(prompt) + 1]:.2f} nats"
    )
    expect(page.get_by_role("list", name="Candidates").locator("li")).to_have_count(6)
    # What was asked is kept in the browser; rows are computed again from the ids.
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.get_by_role("list", name="Candidates").locator("li")).to_have_count(6)
    expect(page.get_by_role("list", name="Read from").locator("li").first).to_be_visible()
    assert not any(url.endswith("/inspect/tokens") for url in asked)


def test_a_model_without_attention_and_one_with_a_window_say_so(tiny, open_page):
    page = begin(open_page(tiny, None))
    use_model(page, "tiny-window")
    ask(page, LONG)
    look_inside(page)
    prompt, written = completion(tiny, LONG, "tiny-window")
    whole = [*prompt, *written]
    position = len(whole) - 2
    choose(page, position)
    row = inspect(
        tiny,
        "full_attn",
        model="tiny-window",
        token_ids=whole[:position],
        trace_layer=0,
        head="mean",
        rows=[position - 1, position],
    )
    start = next(key for key, weight in enumerate(row["attn"][0]) if weight > 0)
    assert start == position - 16
    expect(page.get_by_role("list", name="Read from").locator("li").first).to_be_visible()
    assert all(int(place) >= start for _, place, _ in rows(page, "Read from"))

    use_model(page, "tiny-mamba")
    ask(page, "What is it")
    expect(page.get_by_text("This model has no attention to show")).to_be_visible()
    expect(page.get_by_role("list", name="Candidates").locator("li")).to_have_count(6)
    expect(page.get_by_role("list", name="Layer by layer").locator("li").first).to_be_visible()
    for name in ("Heads", "Matrix"):
        page.get_by_role("tab", name=name).click()
        expect(page.get_by_role("tabpanel", name=name)).to_contain_text("no attention to show")

    # The first answer was another model's: nothing is loaded before somebody says so.
    page.get_by_role("tab", name="Token", exact=True).click()
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Look inside", exact=True).first.click()
    token(page, position - 1).first.click()
    expect(page.get_by_text("Written by tiny-window")).to_be_visible()
    assert httpx.get(f"{tiny}/status", timeout=30).json()["resident"]["model"] == "tiny-mamba"
    page.get_by_role("button", name="Load tiny-window and look").click()
    expect(page.get_by_role("list", name="Read from").locator("li").first).to_be_visible()
    assert httpx.get(f"{tiny}/status", timeout=30).json()["resident"]["model"] == "tiny-window"
    use_model(page, "tiny-llama")
    ask(page, "What")


def test_a_model_that_has_just_come_is_asked_nothing_before_it_says_what_it_can_show(
    scripted, open_page
):
    page = begin(open_page(scripted, None), "scripted", max_tokens="400")
    ask(page, "pausing The first|, and the second", waits=False)
    page.get_by_role("tab", name="Inside").click()
    httpx.post(f"{scripted}/go", timeout=30)
    expect(page.get_by_role("list", name="Read from").locator("li").first).to_be_visible()
    anatomies: list[Route] = []
    questions: list[str] = []
    page.route(re.compile(r"/inspect/model\?.*model=other"), lambda route: anatomies.append(route))
    page.on(
        "request",
        lambda request: (
            request.url.endswith("/inspect/full_attn")
            and questions.append(request.post_data_json["model"])
        ),
    )
    use_model(page, "other")
    with page.expect_request(re.compile(r"/inspect/model\?.*model=other")):
        ask(page, "pausing The first|, and the second", waits=False)
    httpx.post(f"{scripted}/go", timeout=30)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    expect(page.get_by_role("list", name="Candidates").locator("li")).to_have_count(6)
    assert "other" not in questions  # the first answer's may still have been on its way
    with page.expect_request(
        lambda request: (
            request.url.endswith("/inspect/full_attn")
            and request.post_data_json["model"] == "other"
        )
    ):
        anatomies[0].continue_()
    expect(page.get_by_role("list", name="Read from").locator("li").first).to_be_visible()
    use_model(page, "scripted")
    ask(page, "What")


def test_inside_opened_while_the_model_pauses_shows_the_newest_token(scripted, open_page):
    page = begin(open_page(scripted, None), "scripted", max_tokens="400")
    ask(page, "pausing The first|, and the second", waits=False)
    expect(page.get_by_role("article", name="Model")).to_contain_text("The first")
    page.get_by_role("tab", name="Inside").click()
    pressed = page.get_by_role("group", name="Tokens").get_by_role("button", pressed=True)
    expect(pressed).to_have_accessible_name(re.compile(": t$"))
    expect(page.get_by_role("list", name="Candidates").locator("li")).to_have_count(6)
    httpx.post(f"{scripted}/go", timeout=30)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()


def test_tokens_come_live_a_click_pins_and_live_resumes(scripted, open_page):
    page = begin(open_page(scripted, None), "scripted", max_tokens="400")
    page.get_by_role("tab", name="Inside").click()
    ask(page, "pausing The first part|, and the second part", waits=False)
    tape = page.get_by_role("group", name="Tokens")
    expect(tape.get_by_role("button", pressed=True)).to_have_accessible_name(re.compile(": t$"))
    newest = tape.get_by_role("button", pressed=True).get_attribute("data-p")
    choose(page, int(newest) - 3)
    live = page.get_by_role("button", name="Live")
    expect(live).to_be_visible()
    expect(page.get_by_role("button", name="Branch with")).to_have_count(0)
    httpx.post(f"{scripted}/go", timeout=30)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    expect(tape.get_by_role("button", pressed=True)).to_have_attribute(
        "data-p", str(int(newest) - 3)
    )  # still pinned
    expect(live).to_be_hidden()

    ask(page, "pausing Once|, twice", waits=False)
    expect(tape.get_by_role("button", pressed=True)).to_have_accessible_name(re.compile(": e$"))
    page.get_by_role("button", name="Previous token").click()
    page.get_by_role("button", name="Live").click()
    expect(tape.get_by_role("button", pressed=True)).to_have_accessible_name(re.compile(": e$"))
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    httpx.post(f"{scripted}/go", timeout=30)

    page.get_by_role("button", name="Replay").click()
    page.get_by_role("button", name="Pause").click()
    step = page.get_by_role("slider", name="Step")
    step.fill("2")
    expect(page.locator(".where").first).to_have_text(re.compile("^written, 2 of"))
    expect(tape.locator(".later")).not_to_have_count(0)
    page.get_by_role("button", name="End the replay").click()
    expect(tape.locator(".later")).to_have_count(0)


def test_branches_are_stopped_by_escape(scripted, open_page):
    page = begin(open_page(scripted, None), "scripted", max_tokens="150")
    ask(page, "slowly " + "many words, " * 20)
    look_inside(page)
    tape = page.get_by_role("group", name="Tokens")
    first = int(tape.locator(".seg.cur .tok").first.get_attribute("data-p"))
    choose(page, first + 1)
    page.get_by_role("button", name=re.compile("^Branch with ")).first.dispatch_event("click")
    expect(page.get_by_role("button", name="Stop the branches")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Stop the branches")).to_be_hidden()
    branches = page.get_by_role("list", name="Branches").get_by_role("listitem")
    expect(branches).to_contain_text("stopped")
    assert branches.locator(".tok").count() < 140


def test_what_a_model_or_a_user_writes_is_inert(scripted, open_page, dialogs, tmp_path):
    page = watch(begin(open_page(scripted, None), "scripted", max_tokens="100"), dialogs)
    ask(page, HOSTILE)
    tape = look_inside(page)
    expect(tape.locator(".seg.cur .tok")).to_have_count(len(HOSTILE) + 1)
    assert tape.locator("img, script").count() == 0
    with page.expect_download() as shared:
        menu(page, "Share as one HTML page")
    path = tmp_path / "shared.html"
    shared.value.save_as(path)
    page.reload()
    expect(page.get_by_role("group", name="Tokens").locator(".seg.cur .tok")).to_have_count(
        len(HOSTILE) + 1
    )
    alone = watch(page.context.new_page(), dialogs)
    alone.set_content(path.read_text())
    expect(alone.get_by_role("button", name=re.compile("^Token "))).not_to_have_count(0)
    assert alone.locator("img").count() == 0


def test_a_saved_trace_opens_without_a_server_and_is_compared(tiny, open_page, dialogs, tmp_path):
    page = watch(begin(open_page(tiny, None, refusals=True)), dialogs)
    ask(page, "What is the capital of France")
    look_inside(page)
    prompt, written = completion(tiny, "What is the capital of France", "tiny-llama")
    choose(page, len(prompt) + 4)
    expect(page.get_by_role("list", name="Layer by layer").locator("li").first).to_be_visible()
    with page.expect_download() as download:
        menu(page, "Save the trace (JSON lines)")
    path = tmp_path / "saved.jsonl"
    download.value.save_as(path)
    with page.expect_download() as numbers:
        menu(page, "Attention of this layer (NPZ)")
    assert numbers.value.suggested_filename.endswith(".npz")
    with page.expect_download() as picture:
        menu(page, "Picture of this view (PNG)")
    picture.value.save_as(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as shared:
        menu(page, "Share as one HTML page")
    shared.value.save_as(tmp_path / "shared.html")
    reads, candidates = rows(page, "Read from"), rows(page, "Candidates")
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header["prompt"]["token_ids"] == prompt
    assert [line["id"] for line in lines] == written

    lesson = page.context.new_page()  # on the train: nothing answers but the files of the page
    lesson.route(re.compile(r"^http://[^/]+/(?!ui)"), lambda route: route.abort())
    lesson.goto("/ui#inside")
    lesson.get_by_role("tab", name="Inside").click()
    with lesson.expect_file_chooser() as chooser:
        (
            lesson.get_by_role("button", name="Save", exact=True).or_(
                lesson.get_by_role("button", name="Open a saved trace")
            )
        ).first.click()
        if lesson.get_by_role("menuitem", name="Open a saved trace").count():
            lesson.get_by_role("menuitem", name="Open a saved trace").click()
    chooser.value.set_files(path)
    expect(lesson.get_by_text("A saved trace: tiny-llama")).to_be_visible()
    choose(lesson, len(prompt) + 4)
    assert rows(lesson, "Candidates") == candidates
    expect(lesson.get_by_role("list", name="Read from").locator("li")).to_have_count(len(reads))
    for (name, _, share), (other, _, exact) in zip(rows(lesson, "Read from"), reads, strict=True):
        assert (
            abs(float(share[:-2]) - float(exact[:-2])) < 0.3 or name != other
        )  # a byte for each weight
    hostile = tmp_path / "hostile.jsonl"
    hostile.write_text(
        "\n".join(
            json.dumps(line)
            for line in (
                header | {"text": HOSTILE, "model": HOSTILE},
                *(
                    line
                    | {
                        "text": HOSTILE,
                        "attn": [{"layer": 0, "shape": [9, 9], "dtype": "uint8", "data": "!"}],
                    }
                    for line in lines
                ),
            )
        )
    )
    for file in (hostile, tmp_path / "picture.png"):
        with lesson.expect_file_chooser() as chooser:
            menu(lesson, "Open a saved trace")
        chooser.value.set_files(file)
    expect(lesson.get_by_role("alert")).to_contain_text("This file is not a saved trace.")
    assert lesson.locator("img").count() == 0
    lesson.get_by_role("button", name="Close the saved trace").click()

    alone = page.context.new_page()
    alone.set_content((tmp_path / "shared.html").read_text())
    alone.get_by_role("button", name=re.compile(rf"^Token {len(prompt) + 4}: ")).click()
    expect(alone.locator("#cands li").first).to_have_text("".join(candidates[0]))
    expect(alone.locator("#reads li")).not_to_have_count(0)
    assert violations(alone) == []
    alone.keyboard.press("ArrowRight")
    expect(alone.get_by_role("button", pressed=True)).to_have_accessible_name(
        re.compile(f"^Token {len(prompt) + 5}: ")
    )


def test_the_layers_at_which_tokens_were_decided_are_a_colour(tiny, open_page):
    page = begin(open_page(tiny, None))
    ask(page, "What is the capital")
    look_inside(page)
    page.get_by_role("combobox", name="Colour").select_option("decided")
    prompt, written = completion(tiny, "What is the capital", "tiny-llama")
    whole = [*prompt, *written]
    positions = list(range(len(prompt) - 1, len(whole) - 1))
    lens = inspect(
        tiny,
        "logit_lens",
        model="tiny-llama",
        token_ids=whole,
        layers="all",
        positions=positions,
        topk=1,
    )
    decided = []
    for cells, chosen in zip(lens["cells"], written, strict=True):
        layers = [
            layer
            for layer, cell in zip(lens["layers"], cells, strict=True)
            if cell["topk"][0]["token_id"] != chosen
        ]
        decided.append(max(layers, default=-2) + 1)
    latest = decided.index(max(decided))
    element = token(page, len(prompt) + latest).first
    expect(element).to_have_attribute("style", re.compile("--a: 100"))
    choose(page, len(prompt) + latest)
    expect(
        page.get_by_text(f"It is in the first place from layer {max(decided)} on.")
    ).to_be_visible()


@pytest.mark.parametrize("width", [390, 320])
def test_nothing_scrolls_sideways_on_a_phone(tiny, open_page, width):
    page = begin(open_page(tiny, None, size=(width, 740), has_touch=True))
    ask(page, LONG)
    look_inside(page)
    page.get_by_role("button", name=re.compile("^Branch with ")).first.click()
    expect(page.get_by_role("button", name=re.compile("^Keep the branch "))).to_have_count(1)
    for name in ("Token", "Heads", "Matrix", "Why"):
        page.get_by_role("tab", name=name, exact=True).click()
        wide = page.evaluate(
            "[document.documentElement, ...document.querySelectorAll('.tape, .panel')].map(box => box.scrollWidth - box.clientWidth)"
        )
        assert wide == [0, 0, 0], name
