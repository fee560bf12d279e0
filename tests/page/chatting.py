"""What a reader does on the page, and what the tests ask of it."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import Locator, Page, Request, expect


def box(page: Page) -> Any:
    return page.get_by_role("textbox", name="Message", exact=True)


def send(page: Page, text: str) -> None:
    """Say something and wait for the whole answer."""
    page.locator("html[data-ready]").wait_for()
    before = page.get_by_role("article", name="Model").count()
    box(page).fill(text)
    box(page).press("Enter")
    expect(page.get_by_role("article", name="Model")).to_have_count(before + 1)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def side(page: Page) -> Any:
    return page.get_by_role("navigation", name="Conversations")


def model_turn(page: Page) -> Locator:
    return page.get_by_role("article", name="Model").last


def body_of(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = request.post_data_json
    return body


def answered_with(page: Page, *chunks: dict[str, Any], finish: str | None = "stop") -> list[Any]:
    """Let the page's next chats be answered with these deltas; returns the bodies that it sends."""
    bodies: list[Any] = []

    def answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        lines = [
            {"choices": [{"index": 0, "delta": chunk}], "model": "scripted"} for chunk in chunks
        ]
        lines.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
        route.fulfill(content_type="text/event-stream", body=f"{text}data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    return bodies


def stored(page: Page) -> list[dict[str, Any]]:
    """The messages of the newest chat, as the browser keeps them."""
    return sorted(_stored_chat(page)["nodes"].values(), key=lambda node: node["at"])


def stored_leaf(page: Page) -> dict[str, Any]:
    """The last message of the newest chat's chosen branch, as the browser keeps it."""
    chat = _stored_chat(page)
    return dict(chat["nodes"][chat["leaf"]])


def _stored_chat(page: Page) -> dict[str, Any]:
    chat: dict[str, Any] = page.evaluate(
        """() => new Promise((done) => {
          const open = indexedDB.open('transformers-api');
          open.onsuccess = () => {
            const all = open.result.transaction('chats').objectStore('chats').getAll();
            all.onsuccess = () => done(all.result.sort((a, b) => a.changed - b.changed).at(-1));
          };
        })"""
    )
    return chat
