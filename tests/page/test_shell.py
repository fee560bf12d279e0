"""The frame of the page: views, chats in the side, dialogs, keys, what outlives a reload, small screens."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.page.chatting import box, send, side
from tests.page.conftest import violations
from tests.repeats import slow

MODIFIED = {"bypass_csp": True}  # so that axe may be put into the page


def test_views_are_tabs_that_the_address_names_and_the_keyboard_reaches(scripted, open_page):
    page = open_page(scripted, "/ui#models")
    tabs = page.get_by_role("tablist", name="Views")
    expect(tabs.get_by_role("tab", name="Models")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("form", name="Write a message")).to_be_hidden()
    tabs.get_by_role("tab", name="Models").press("ArrowRight")
    expect(tabs.get_by_role("tab", name="Chat")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Chat")).to_be_visible()
    assert "#" not in page.url
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="Models")).to_be_visible()
    page.keyboard.press("Alt+2")
    expect(page.get_by_role("tab", name="Inside", exact=True)).to_be_focused()
    assert page.url.endswith("#inside")
    page.keyboard.press("Alt+1")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.keyboard.press("/")
    expect(box(page)).to_be_focused()
    page.keyboard.type("?/")
    expect(box(page)).to_have_value("?/")


def test_chats_are_found_renamed_deleted_and_brought_back(scripted, open_page):
    page = open_page(scripted)
    send(page, "An apple\nand its second line")
    page.keyboard.press("Alt+n")
    expect(page.get_by_role("article")).to_have_count(0)
    send(page, "<img src=x onerror=alert(1)> & a pear")
    entries = side(page).get_by_role("list", name="Chats").get_by_role("button")
    hostile = side(page).get_by_role(
        "button", name="<img src=x onerror=alert(1)> & a pear", exact=True
    )
    expect(hostile).to_have_attribute("aria-current", "true")
    expect(page).to_have_title("<img src=x onerror=alert(1)> & a pear")
    search = side(page).get_by_role("searchbox", name="Search chats")
    search.fill("SECOND line")
    expect(side(page).get_by_role("button", name="An apple", exact=True)).to_be_visible()
    expect(hostile).to_be_hidden()
    search.fill("nobody said this")
    expect(side(page).get_by_text("No chat has this")).to_be_visible()
    search.fill("")
    side(page).get_by_role("button", name="Rename An apple").click()
    page.get_by_role("textbox", name="Title of the chat").fill("Fruit")
    page.keyboard.press("Enter")
    expect(side(page).get_by_role("button", name="Fruit", exact=True)).to_be_focused()
    side(page).get_by_role("button", name="Fruit", exact=True).click()
    expect(page.get_by_role("article", name="You")).to_have_text(re.compile("An apple\nand"))
    side(page).get_by_role("button", name="Delete Fruit").click()
    expect(page.get_by_role("article")).to_have_count(0)
    page.get_by_role("alert").get_by_role("button", name="Undo").click()
    expect(side(page).get_by_role("button", name="Fruit", exact=True)).to_be_visible()
    page.reload()
    expect(entries).to_have_count(6)  # two chats: open, rename, delete
    side(page).get_by_role("button", name="Delete Fruit").click()
    expect(entries).to_have_count(3)
    page.reload()
    expect(hostile).to_be_visible()
    expect(entries).to_have_count(3)


def test_a_reload_keeps_chat_draft_theme_model_and_settings(scripted, open_page):
    page = open_page(scripted, reduced_motion="no-preference")
    send(page, "first words")
    box(page).fill("a draft\nof two lines")
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").click()
    page.get_by_role("button", name=re.compile("^Settings")).click()
    dialog = page.get_by_role("dialog", name="Settings")
    dialog.get_by_role("spinbutton", name="Temperature").fill("0.25")
    dialog.get_by_role("textbox", name="System message").fill("Be brief")
    dialog.get_by_role("button", name="Done").click()
    page.get_by_role("combobox", name="Model").select_option("other")
    expect(page.get_by_role("alert")).to_contain_text(
        "other is loaded with your next message, in place of scripted"
    )
    page.reload()
    expect(page.get_by_role("article", name="Model")).to_contain_text("first words")
    expect(box(page)).to_have_value("a draft\nof two lines")
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.get_by_role("combobox", name="Model")).to_have_value("other")
    expect(
        page.get_by_role("button", name="Settings temperature 0.25, system message")
    ).to_be_visible()
    side(page).get_by_role("button", name="New chat").click()
    expect(box(page)).to_have_value("")
    side(page).get_by_role("button", name="first words", exact=True).click()
    expect(box(page)).to_have_value("a draft\nof two lines")


def test_the_menu_is_a_menu_and_shows_the_request_in_three_languages(scripted, open_page):
    page = open_page(scripted)
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("More", exact=True).click()
    page.get_by_role("spinbutton", name="Repetition penalty").fill("1.1")
    page.get_by_role("spinbutton", name="Min p").fill("0.1")
    page.get_by_role("button", name="Done").click()
    send(page, 'it\'s "quoted"')
    more = page.get_by_role("button", name="More", exact=True)
    more.press("Enter")
    menu = page.get_by_role("menu", name="More")
    expect(menu.get_by_role("menuitem").first).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(menu.get_by_role("menuitem", name="API documentation")).to_be_focused()
    page.keyboard.press("Escape")
    expect(menu).to_be_hidden()
    expect(more).to_be_focused()
    more.click()
    menu.get_by_role("menuitem", name="Show the request").click()
    dialog = page.get_by_role("dialog", name="The request behind this view")
    code = dialog.get_by_role("tabpanel")
    expect(code).to_contain_text("curl -N 'http")
    expect(code).to_contain_text("it'\\''s \\\"quoted\\\"")
    dialog.get_by_role("tab", name="curl").press("ArrowRight")
    expect(code).to_contain_text("client.chat.completions.create(")
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        exec(code.inner_text(), {})
    assert written.getvalue() == 'it\'s "quoted"'
    dialog.get_by_role("tab", name="Python").press("ArrowRight")
    expect(code).to_contain_text("await fetch(")
    dialog.get_by_role("button", name="Close").click()
    more.click()
    menu.get_by_role("menuitem", name="Switch single-letter keys off").click()
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("?")
    page.keyboard.press("/")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(box(page)).not_to_be_focused()


def test_a_chat_goes_out_as_a_file_and_comes_back_inert(scripted, open_page, tmp_path: Path):
    page = open_page(scripted)
    hostile = "<script>document.title='owned'</script> [x](javascript:alert(1))"
    send(page, hostile)
    more = page.get_by_role("button", name="More", exact=True)
    more.click()
    with page.expect_download() as caught:
        page.get_by_role("menuitem", name="Export this chat").click()
    file = tmp_path / "chat.json"
    caught.value.save_as(file)
    text = file.read_text()
    assert '"format": "transformers-api.chat/1"' in text
    assert '"topk"' in text
    more.click()
    with page.expect_download() as caught:
        page.get_by_role("menuitem", name="Save as Markdown").click()
    assert hostile in Path(caught.value.path()).read_text()
    file.write_text(text.replace('"v": 1', '"v": 1, "evil": "<b>", "__proto__": {"polluted": 1}'))
    for name, sentence in ((file, "The chat is imported"), (__file__, "no exported chat")):
        more.click()
        with page.expect_file_chooser() as choosing:
            page.get_by_role("menuitem", name="Import a chat").click()
        choosing.value.set_files(name)
        expect(page.get_by_role("alert")).to_contain_text(
            re.compile(sentence.replace("no", "not an?")) if "no " in sentence else sentence
        )
    expect(page.get_by_role("article", name="Model")).to_contain_text(hostile.split(" [")[0])
    expect(page.get_by_role("button", name=re.compile("^Surprisal of"))).to_be_visible()
    page.reload()
    expect(page.get_by_role("article", name="Model")).to_contain_text(hostile.split(" [")[0])
    assert page.evaluate("({}).polluted") is None
    assert page.locator("a[href^=javascript], #log script").count() == 0
    assert page.title() != "owned"


def test_the_key_is_asked_for_kept_in_the_tab_and_nowhere_else(scripted, open_page):
    page = open_page(scripted, None, refusals=True)
    refuse = {
        "error": {
            "message": "Incorrect API key provided",
            "type": "invalid_request_error",
            "code": "invalid_api_key",
        }
    }

    late: list[Any] = []  # refusals of questions without the key that come when it was entered

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer s3cret":
            route.fallback()
        elif route.request.url.endswith("/models") and "/v1/" not in route.request.url and not late:
            late.append(route)
        else:
            route.fulfill(status=401, json=refuse)

    for path in ("**/v1/**", "**/status", "**/models", "**/inspect/**"):
        page.route(path, guard)
    page.goto("/ui")
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_role("textbox", name="API key").fill("s3cret")
    expect(dialog.get_by_role("checkbox", name="Remember it in this browser")).not_to_be_checked()
    dialog.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("combobox", name="Model")).to_have_value("scripted")
    assert late
    with page.expect_response(lambda answer: answer.status == 401):
        late[0].fulfill(status=401, json=refuse)
    expect(dialog).to_be_hidden()
    send(page, "hello")
    page.reload()
    expect(page.get_by_role("combobox", name="Model")).to_have_value("scripted")
    kept = "JSON.stringify({...localStorage}) + document.documentElement.outerHTML + location.href"
    assert "s3cret" not in page.evaluate(kept)
    fresh = page.context.new_page()
    fresh.route("**/v1/**", guard)
    fresh.goto("/ui")
    expect(fresh.get_by_role("dialog", name="API key")).to_be_visible()
    fresh.keyboard.press("Escape")
    expect(fresh.get_by_role("dialog", name="API key")).to_be_hidden()


def test_a_key_without_the_scope_of_the_status_still_sees_that_the_server_is_there(
    scripted, open_page
):
    page = open_page(scripted, None, refusals=True)
    page.route("**/status", lambda route: route.fulfill(status=403, json={"detail": "needs admin"}))
    page.goto("/ui")
    expect(page.get_by_role("heading", name="scripted is ready.")).to_be_visible()
    expect(side(page).get_by_role("button", name=re.compile("^Ready"))).to_be_visible()
    send(page, "hello")


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 568)])
def test_a_phone_has_a_drawer_and_nothing_scrolls_sideways(scripted, open_page, width, height):
    page = open_page(scripted, size=(width, height), has_touch=True)
    row = "long words here|" * 6
    box(page).fill(f"a{'b' * 90}\n\n```\n{'x' * 90}\n```\n\n|{row}\n|{'-|' * 6}\n|{row}")
    box(page).press("Enter")  # a phone's keyboard has no other way to a new line
    page.get_by_role("button", name="Send").tap()
    expect(page.get_by_role("table")).to_be_visible()
    for view in ("Chat", "Inside", "Models"):
        page.get_by_role("tab", name=view, exact=True).click()
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert page.evaluate("document.getElementById('main').scrollWidth") <= width
    expect(side(page)).to_be_hidden()
    page.get_by_role("button", name="Open conversations").click()
    expect(page.get_by_role("button", name="Close conversations")).to_be_focused()
    page.keyboard.press("Escape")
    expect(side(page)).to_be_hidden()
    expect(page.get_by_role("button", name="Open conversations")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", *slow("dark")])
def test_axe_finds_nothing_in_the_chat_its_dialogs_and_its_menu(scripted, open_page, scheme):
    page = open_page(scripted, scheme=scheme, **MODIFIED)
    expect(page.get_by_role("heading", name="scripted is ready.")).to_be_visible()
    assert violations(page) == []
    send(
        page,
        "# Title\n\n- [x] done\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 'y'  # z\n```\n\n$E=mc^2$ [a link](https://example.org)",
    )
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("group", name="Versions")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="Edit").click()
    assert violations(page) == []
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Compare versions").click()
    assert violations(page) == []
    for opener, dialog in ((re.compile("^Settings"), "Settings"), ("More", None)):
        page.get_by_role("button", name=opener, exact=True).click()
        assert violations(page) == []
        if dialog:
            page.get_by_role("dialog", name=dialog).get_by_role("button", name="Done").click()
    page.keyboard.press("Escape")
    page.keyboard.press("?")


def test_one_heading_of_the_first_level_and_a_status_that_speaks(scripted, open_page):
    page = open_page(scripted)
    expect(page.get_by_role("heading", level=1)).to_have_text("scripted is ready.")
    send(page, "# mine\n###### deep")
    expect(page.get_by_role("heading", level=1)).to_have_text("Conversation")
    expect(page.get_by_role("heading", level=3)).to_have_text("mine")
    expect(page.get_by_role("heading", level=6)).to_have_text("deep")
    expect(page.get_by_role("status")).to_have_text(re.compile(r"Answer complete, \d+ tokens"))
    expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "off")


def test_many_chats_are_listed_without_their_tokens_and_lose_none(scripted, open_page):
    page = open_page(scripted)
    send(page, "the first of many")
    page.evaluate(
        """() => new Promise((done) => {
          const open = indexedDB.open('transformers-api');
          open.onsuccess = () => {
            const store = open.result.transaction('chats', 'readwrite').objectStore('chats');
            store.getAll().onsuccess = ({target: {result: [chat]}}) => {
              for (let i = 0; i < 60; i += 1) store.put({...chat, id: `copy-${i}`, title: `Copy ${i}`, changed: i});
            };
            store.transaction.oncomplete = done;
          };
        })"""
    )
    page.reload()
    entry = side(page).get_by_role("button", name="Copy 7", exact=True)
    expect(entry).to_be_visible()
    side(page).get_by_role("button", name="Rename Copy 7").click()
    page.get_by_role("textbox", name="Title of the chat").fill("Seven")
    page.keyboard.press("Enter")
    side(page).get_by_role("button", name="Delete Copy 8").click()
    page.get_by_role("button", name="Undo").click()
    for name in ("Seven", "Copy 8"):
        side(page).get_by_role("button", name=name, exact=True).click()
        expect(side(page).locator("[aria-current=true]")).to_have_text(name)
        expect(
            page.get_by_role("button", name=re.compile("^Surprisal of 18 tokens"))
        ).to_be_visible()
    page.get_by_role("button", name="More", exact=True).click()
    with page.expect_download() as caught:
        page.get_by_role("menuitem", name="Export all chats").click()
    chats = json.loads(Path(caught.value.path()).read_text())["chats"]
    assert len(chats) == 61
    assert all(any("tokens" in node for node in chat["nodes"].values()) for chat in chats)


def test_a_second_tab_shows_what_the_first_wrote_and_does_not_overwrite_it(scripted, open_page):
    first = open_page(scripted)
    send(first, "one")
    second = first.context.new_page()
    second.goto("/ui")
    expect(second.get_by_role("article")).to_have_count(2)
    send(first, "two")
    seen = "document.dispatchEvent(new Event('visibilitychange'))"
    second.evaluate(seen)
    expect(second.get_by_role("article")).to_have_count(4)
    send(second, "three")
    first.evaluate("dispatchEvent(new Event('pagehide'))")
    first.close()
    second.reload()
    expect(second.get_by_role("article")).to_have_count(6)
