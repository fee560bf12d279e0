"""What others wrote and what the browser refuses: nothing of it takes the page or a chat away."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.page.chatting import answered_with, box, model_turn, send, stored

TOKEN = {"id": 1, "text": "word", "surprisal": 1, "entropy": 1, "rank": 0, "topk": []}


def choose(page: Page, name: str, text: str, *, role: Any = "menuitem") -> None:
    """Give a file with this text to the control that asks for one."""
    with page.expect_file_chooser() as choosing:
        page.get_by_role(role, name=name).click()
    choosing.value.set_files(
        {"name": "file.json", "mimeType": "application/json", "buffer": text.encode()}
    )


def import_chat(page: Page, leaf: str, *nodes: dict[str, Any]) -> None:
    chat = {"title": "imported", "leaf": leaf, "nodes": {node["id"]: node for node in nodes}}
    page.get_by_role("button", name="More", exact=True).click()
    text = json.dumps({"format": "transformers-api.chat/1", "chat": chat})
    choose(page, "Import a chat", text)
    expect(page.get_by_role("alert")).to_contain_text("The chat is imported")


@pytest.mark.slow
def test_lists_and_quotes_deeper_than_the_stack_are_shown_as_written(scripted, open_page):
    page = open_page(scripted)
    answered_with(
        page, *({"content": mark * 8000} for mark in ("> ", "- ")), {"content": "the end"}
    )
    send(page, "go on for ever")
    expect(model_turn(page)).to_contain_text("the end")
    page.reload()
    expect(model_turn(page)).to_contain_text("the end")
    send(page, "and again")
    expect(page.get_by_role("article", name="Model")).to_have_count(2)


def test_an_imported_chat_that_goes_in_circles_turns_to_every_version(scripted, open_page):
    page = open_page(scripted, refusals=True)
    user = {"id": "b", "parent": "c", "role": "user", "text": "first"}
    above = {"id": "c", "parent": "b", "role": "assistant", "text": "above", "finish": "stop"}
    result = {"id": "d", "parent": "c", "role": "tool", "text": "of no call"}
    other = {"id": "e", "parent": "b", "role": "assistant", "text": "other", "finish": "stop"}
    edits = [{"do": "ablate", "part": "mlp", "layer": 0}, None, 7, {"do": {}}, ["do"]]
    other["asked"] = {"intervene": {"edits": edits}}
    import_chat(page, "e", user, above, other, result)
    expect(model_turn(page)).to_contain_text("changed by 1 edit")
    page.get_by_role("button", name="Previous version").last.click()
    expect(page.get_by_role("article", name="Result of")).to_contain_text("of no call")
    send(page, "it goes on")
    expect(model_turn(page)).to_contain_text(re.compile("it goes on|is of no call"))


def test_places_in_an_imported_chat_are_those_of_its_tokens(scripted, open_page):
    page = open_page(scripted)
    spans = [{"role": "user", "start": -(10**15), "end": 10**15}]
    answer = {
        "prompt": {"token_ids": [1, 2], "tokens": ["a", "b"], "spans": spans},
        "tokens": [{**TOKEN, "position": -7}, {**TOKEN, "position": 10**15}],
    }
    import_chat(
        page,
        "b",
        {"id": "a", "parent": None, "role": "user", "text": "question"},
        {"id": "b", "parent": "a", "role": "assistant", "text": "word", "finish": "stop"} | answer,
    )
    page.get_by_role("tab", name="Inside").click()
    names = [f"Token {place}: " for place in range(4)]
    for name in names:
        expect(page.get_by_role("button", name=re.compile(f"^{name}"))).to_have_count(1)


def test_a_saved_trace_with_wild_numbers_opens(scripted, open_page):
    page = open_page(scripted, "/ui#inside")
    prompt = {"token_ids": [1], "tokens": ["a"]}
    prompt |= {"spans": [{"role": "user", "start": -(10**15), "end": 10**15}]}
    header = {"format": "transformers-api.trace/1", "prompt": prompt, "layer": -5}
    header["shape"] = {"layers": 1e15, "heads": 1e15}
    row = {"layer": 0, "key_start": -3, "dtype": "uint8", "data": "AAEC", "sink": ["<b>"]}
    tokens = [
        TOKEN | {"surprisal": -1e308, "attn": [row | {"shape": [-1, -3], "scale": [1]}]},
        TOKEN | {"surprisal": 1e308, "attn": [row | {"shape": [1, 3], "scale": "x"}]},
    ]
    lines = "\n".join(map(json.dumps, [header, *tokens]))
    choose(page, "Open a saved trace", lines, role="button")
    for place in (0, 1, 2):
        token = page.get_by_role("button", name=re.compile(f"^Token {place}: "))
        token.click()
        expect(token).to_have_attribute("aria-pressed", "true")


def two_tabs(open_page, scripted):
    """Two tabs of one browser that show the same chat, which begins with "one"."""
    first = open_page(scripted)
    send(first, "one")
    second = first.context.new_page()
    second.goto("/ui")
    expect(second.get_by_role("article")).to_have_count(2)
    return first, second


def test_two_tabs_that_write_into_one_chat_keep_what_both_wrote(scripted, open_page):
    first, second = two_tabs(open_page, scripted)
    for page, text in ((first, "two"), (second, "three"), (first, "four")):
        send(page, text)
    second.close()
    first.reload()
    expect(model_turn(first)).to_contain_text("four")
    users = {node["text"] for node in stored(first) if node["role"] == "user"}
    assert users == {"one", "two", "three", "four"}


def test_a_chat_that_is_written_twice_at_once_keeps_what_another_tab_wrote(scripted, open_page):
    first, second = two_tabs(open_page, scripted)
    send(second, "two")
    first.evaluate(
        """async () => {
          const app = document.querySelector("script[type=module]").src;
          const [{ keep }, { state }] = await Promise.all(
            ["store", "state"].map((name) => import(app.replace("app.js", `core/${name}.js`))));
          await Promise.all([keep(state.chat), keep(state.chat)]);
        }"""
    )
    assert {node["text"] for node in stored(first) if node["role"] == "user"} == {"one", "two"}


def test_a_tab_that_is_closed_before_it_has_written_takes_nothing_from_another(scripted, open_page):
    first, second = two_tabs(open_page, scripted)
    send(second, "two")
    first.evaluate(
        """async () => {
          const app = document.querySelector("script[type=module]").src;
          const [{ keepSoon, removeNode }, { state }] = await Promise.all(
            ["store", "state"].map((name) => import(app.replace("app.js", `core/${name}.js`))));
          const { chat } = state;
          const answer = chat.nodes[chat.leaf];
          chat.nodes.own = { ...answer, id: "own", role: "user", text: "three", at: Date.now() };
          chat.leaf = "own";
          removeNode(chat, answer.id);
          keepSoon(chat);
          setTimeout(() => { location.href = "about:blank"; });
        }"""
    )
    first.wait_for_url("about:blank")
    first.goto(f"{scripted}/ui")
    expect(first.get_by_role("article").first).to_be_visible()
    nodes = stored(first)
    assert {node["text"] for node in nodes if node["role"] == "user"} == {"one", "two", "three"}
    assert sum(node["role"] == "assistant" for node in nodes) == 1
    send(second, "four")
    users = {node["text"] for node in stored(second) if node["role"] == "user"}
    assert users == {"one", "two", "three", "four"}


def test_a_browser_without_room_says_so_and_goes_on(scripted, open_page):
    page = open_page(scripted)
    page.evaluate(
        "() => { IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceededError'); }; }"
    )
    send(page, "one")
    expect(page.get_by_role("alert")).to_contain_text("no room left")
    send(page, "two")
    expect(model_turn(page)).to_contain_text("two")
    expect(box(page)).to_have_value("")
