"""The view Chat: writing, stopping, versions, settings, going on."""

from __future__ import annotations

import json
import re

from playwright.sync_api import Route, expect

from tests.page.chatting import (
    answered_with,
    body_of,
    box,
    model_turn,
    send,
    side,
    stored,
    stored_leaf,
)


def test_an_answer_streams_with_a_caret_is_stopped_and_the_server_stops_too(scripted, open_page):
    page = open_page(scripted)
    box(page).fill("forever again and ")
    box(page).press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    expect(model_turn(page)).to_contain_text("again and again and again")
    expect(page.locator(".caret")).to_have_count(1)
    expect(page.get_by_text(re.compile(r"^\d+ tokens, \d+\.\d tokens/s$"))).to_be_visible()
    box(page).fill("a draft meanwhile")
    box(page).press("Enter")
    expect(box(page)).to_have_value("a draft meanwhile")
    page.keyboard.press("Escape")
    expect(page.get_by_text("You stopped it here.")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Stopped")
    expect(page.locator(".caret")).to_have_count(0)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    written = model_turn(page).locator(".prose").inner_text()
    expect(side(page).get_by_role("button", name=re.compile("^Ready"))).to_be_visible()
    status = page.request.get(f"{scripted}/status").json()
    assert status["resident"]["running"] == 0
    page.reload()
    expect(model_turn(page).locator(".prose")).to_have_text(written)
    expect(page.get_by_text("You stopped it here.")).to_be_visible()
    expect(box(page)).to_have_value("a draft meanwhile")


def test_regenerate_edit_and_compare_make_versions_and_lose_none(scripted, open_page):
    page = open_page(scripted)
    send(page, "one")
    send(page, "two")
    model_turn(page).get_by_role("button", name="Regenerate").click()
    versions = page.get_by_role("group", name="Versions")
    expect(versions).to_contain_text("2 / 2")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    versions.get_by_role("button", name="Previous version").click()
    expect(versions).to_contain_text("1 / 2")
    expect(versions.get_by_role("button", name="Previous version")).to_be_disabled()
    versions.get_by_role("button", name="Compare versions").click()
    compared = page.get_by_role("group", name="Compared versions")
    expect(compared.get_by_role("article", name="Model")).to_have_count(2)
    expect(compared.get_by_role("button", name="Kept")).to_have_count(1)
    compared.get_by_role("button", name="Keep this one").click()
    expect(compared).to_have_count(0)
    expect(page.get_by_role("group", name="Versions")).to_contain_text("2 / 2")
    first = page.get_by_role("article", name="You").first
    first.get_by_role("button", name="Edit").click()
    field = page.get_by_role("textbox", name="Edit message")
    expect(field).to_be_focused()
    field.fill("never sent")
    field.press("Escape")
    expect(first).to_contain_text("one")
    first.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit message").fill("uno")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Send as a new version").click()
    assert body_of(sent.value)["messages"] == [{"role": "user", "content": "uno"}]
    expect(page.get_by_role("article")).to_have_count(2)
    expect(model_turn(page)).to_contain_text("uno")
    for _ in range(2):
        page.get_by_role("article", name="You").first.get_by_role(
            "button", name="Previous version"
        ).click()
        expect(page.get_by_role("article")).to_have_count(4)
        page.get_by_role("article", name="You").first.get_by_role(
            "button", name="Next version"
        ).click()
        expect(page.get_by_role("article")).to_have_count(2)
        while "uno" not in stored_leaf(page)["text"]:  # which is soon
            page.wait_for_timeout(50)
        page.reload()


def test_a_message_sent_before_the_page_has_heard_of_the_model_is_noted_like_any_other(
    scripted, open_page
):
    page = open_page(scripted, None)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/inspect/model?*", hold)
    with page.expect_request("**/inspect/model?*"):
        page.goto("/ui")
    box(page).fill("plain")
    with page.expect_request("**/v1/chat/completions") as sent:
        box(page).press("Enter")
        held[0].continue_()
    assert body_of(sent.value)["trace"]["attn"] == "u8"


def test_the_settings_are_in_the_request_and_nothing_else_is(scripted, open_page):
    page = open_page(scripted)
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "plain")
    body = body_of(sent.value)
    trace = body.pop("trace")
    page.reload()
    page.get_by_role("button", name="Show the request").click()
    shown = page.get_by_role("dialog").get_by_role("tabpanel").inner_text()
    assert json.loads(shown.split("-d '")[1].removesuffix("'")) == body_of(sent.value)
    page.get_by_role("button", name="Close").click()
    assert trace.items() >= {"topk": 10, "specials": True, "required": False, "attn": "u8"}.items()
    assert body == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "plain"}],
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.get_by_role("button", name=re.compile("^Settings")).click()
    dialog = page.get_by_role("dialog", name="Settings")
    numbers = {
        "Temperature": "0",
        "Top p": "0.5",
        "Longest answer": "77",
        "Seed": "0",
        "Min p": "0.1",
    }
    dialog.get_by_text("More", exact=True).click()
    for name, value in numbers.items():
        dialog.get_by_role("spinbutton", name=name).fill(value)
    dialog.get_by_role("textbox", name="System message").fill("<b>brief</b>")
    dialog.get_by_role("textbox", name="Stop at").fill("END\n###")
    dialog.get_by_role("textbox", name="Tools").fill("{oops")
    dialog.get_by_role("button", name="Done").click()
    expect(dialog.get_by_role("alert")).to_contain_text("Tools: this is no JSON")
    dialog.get_by_role("textbox", name="Tools").fill("")
    dialog.get_by_role("textbox", name="JSON schema").fill(
        '{"type": "object", "properties": {"a": {"type": "string"}}}'
    )
    dialog.get_by_role("button", name="Done").click()
    bodies = answered_with(page, {"content": '{"a": "b"}'})
    send(page, "formed")
    assert bodies[0]["messages"][0] == {"role": "system", "content": "<b>brief</b>"}
    assert [m["content"] for m in bodies[0]["messages"]] == [
        "<b>brief</b>",
        "plain",
        "plain",
        "formed",
    ]
    expected = {
        "temperature": 0,
        "top_p": 0.5,
        "max_tokens": 77,
        "seed": 0,
        "min_p": 0.1,
        "stop": ["END", "###"],
    }
    assert bodies[0].items() >= expected.items()
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert bodies[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema},
    }
    page.get_by_role(
        "button", name=re.compile("^Settings temperature 0, seed 0, system message, JSON schema")
    ).click()
    dialog.get_by_role("button", name="Reset").click()
    dialog.get_by_role("spinbutton", name="Temperature").fill("3")
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_be_visible()  # beyond what the field allows
    dialog.get_by_role("spinbutton", name="Temperature").fill("")
    dialog.get_by_role("button", name="Done").click()
    expect(page.get_by_role("button", name="Settings", exact=True)).to_be_visible()


def test_an_answer_that_was_cut_goes_on_in_its_place(scripted, open_page):
    page = open_page(scripted)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("spinbutton", name="Longest answer").fill("5")
    page.get_by_role("button", name="Done").click()
    send(page, "abcdefgh")
    expect(page.get_by_text("It stopped at the token limit.")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Answer cut at 5 tokens")
    expect(model_turn(page).locator(".prose")).to_have_text("abcde")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Continue").click()
    body = body_of(sent.value)
    assert body["continue_final_message"] is True
    assert body["messages"][-1] == {"role": "assistant", "content": "abcde"}
    expect(model_turn(page).locator(".prose")).to_have_text("abcdefgh")
    expect(page.get_by_text("It stopped at the token limit.")).to_be_hidden()
    expect(page.get_by_role("group", name="Versions")).to_have_count(0)
    expect(page.get_by_role("button", name="Surprisal of 9 tokens: look inside")).to_be_visible()
    assert stored(page)[-1]["usage"]["completion_tokens"] == 9
    tokens = stored(page)[-1]["tokens"]
    assert "".join(token["text"] for token in tokens[:-1]) == "abcdefgh"
    assert [token["position"] - tokens[0]["position"] for token in tokens] == list(range(9))


def test_the_reader_is_followed_to_the_end_only_while_they_are_there(scripted, open_page):
    page = open_page(scripted)
    send(page, "\n\n".join(f"paragraph {i}" for i in range(60)))
    scroll = page.locator("#chat-scroll")
    gap = "(s) => s.scrollHeight - s.scrollTop - s.clientHeight"
    expect(page.get_by_role("button", name="To the newest")).to_be_hidden()
    assert scroll.evaluate(gap) < 5
    scroll.hover()
    page.mouse.wheel(0, -1500)
    expect(page.get_by_role("button", name="To the newest")).to_be_visible()
    box(page).fill("forever line\n")
    page.get_by_role("button", name="Send").click()
    expect(model_turn(page)).to_contain_text("line")
    assert scroll.evaluate(gap) < 90  # who sends wants to see the answer
    scroll.hover()
    page.mouse.wheel(0, -1500)
    expect(page.get_by_role("button", name="To the newest")).to_be_visible()
    top = scroll.evaluate("(s) => s.scrollTop")
    expect(page.get_by_text(re.compile(r"^\d{3,} tokens"))).to_be_visible()
    assert abs(scroll.evaluate("(s) => s.scrollTop") - top) < 2
    page.get_by_role("button", name="To the newest").click()
    expect(page.get_by_role("button", name="To the newest")).to_be_hidden()
    page.keyboard.press("Escape")


def test_a_starter_asks_for_the_likeliest_answer_unless_a_temperature_is_set(scripted, open_page):
    page = open_page(scripted)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("tabpanel").get_by_role("button", name="Tell me a story").click()
    assert body_of(sent.value)["temperature"] == 0
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    page.get_by_role("button", name=re.compile("^Settings")).click()
    page.get_by_role("spinbutton", name="Temperature").fill("1.5")
    page.get_by_role("button", name="Done").click()
    page.keyboard.press("Alt+n")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("tabpanel").get_by_role("button", name="Tell me a story").click()
    assert body_of(sent.value)["temperature"] == 1.5


def test_a_new_chat_from_an_answer_leaves_the_old_one_as_it_was(scripted, open_page):
    page = open_page(scripted)
    send(page, "one")
    send(page, "two")
    page.get_by_role("button", name="New chat from here").first.click()
    expect(page.get_by_role("article")).to_have_count(2)
    send(page, "three")
    entries = side(page).get_by_role("button", name="one", exact=True)
    expect(entries).to_have_count(2)
    entries.nth(1).click()
    expect(page.get_by_role("article")).to_have_text(
        [re.compile("one"), re.compile("one"), re.compile("two"), re.compile("two")]
    )


def test_a_text_file_that_is_dropped_is_put_into_the_box(scripted, open_page):
    page = open_page(scripted)
    for content, shown in (("from a file", "from a file"), ("\u0000\u0001", "from a file")):
        data = page.evaluate_handle(
            "(text) => { const all = new DataTransfer(); all.items.add(new File([text], 'a.txt')); return all; }",
            content,
        )
        box(page).dispatch_event("drop", {"dataTransfer": data})
        expect(box(page)).to_have_value(shown)
    expect(page.get_by_role("alert")).to_contain_text("a.txt is no text file.")


def test_a_chat_is_had_by_the_keyboard_alone(scripted, open_page):
    page = open_page(scripted)

    def reach(name: str, key: str = "Shift+Tab") -> None:
        for _ in range(40):
            if page.evaluate("document.activeElement.getAttribute('aria-label')") == name:
                return
            page.keyboard.press(key)
        raise AssertionError(name)

    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    page.keyboard.press("Enter")
    expect(model_turn(page)).to_contain_text("first")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(box(page)).to_be_focused()
    reach("Regenerate")
    page.keyboard.press("Enter")
    expect(page.get_by_role("group", name="Versions")).to_contain_text("2 / 2")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(box(page)).to_be_focused()
    reach("Previous version")
    page.keyboard.press("Space")
    expect(page.get_by_role("group", name="Versions")).to_contain_text("1 / 2")
    reach("Edit")
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Edit message")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("second")
    page.keyboard.press("Control+Enter")
    expect(model_turn(page)).to_contain_text("second")
    page.keyboard.press("/")
    expect(box(page)).to_be_focused()
