"""What the tests of the view Inside share: asking, choosing a token, the same numbers from the API."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from typing import Any

import httpx
from playwright.sync_api import Locator, Page, expect

SETTINGS = {"temperature": "0", "max_tokens": "12"}


def begin(page: Page, model: str = "tiny-llama", **settings: str) -> Page:
    """Open the page with this model and these settings, as a user has chosen them before."""
    chosen = {"model": model, "settings": SETTINGS | settings}
    script = "for (const [name, value] of Object.entries(CHOSEN)) localStorage.setItem(`transformers-api.${name}`, JSON.stringify(value));"
    page.add_init_script(script.replace("CHOSEN", json.dumps(chosen)))
    page.goto("/ui")
    return page


def ask(page: Page, text: str, *, waits: bool = True) -> None:
    """Send a message, and wait for the whole answer."""
    message = page.get_by_role("textbox", name="Message")
    message.fill(text)
    with (
        page.expect_request_finished(lambda request: request.url.endswith("/chat/completions"))
        if waits
        else nullcontext()
    ):
        page.get_by_role("button", name="Send", exact=True).click()
    if waits:
        expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()


def look_inside(page: Page) -> Locator:
    page.get_by_role("tab", name="Inside").click()
    return page.get_by_role("group", name="Tokens")


def token(page: Page, position: int) -> Locator:
    return page.get_by_role("button", name=re.compile(rf"^Token {position}: "))


def choose(page: Page, position: int) -> Locator:
    element = token(page, position).first
    element.click()
    expect(element).to_have_attribute("aria-pressed", "true")
    return element


def rows(page: Page, name: str) -> list[list[str]]:
    """The texts of each row of a list of the panel, without what only a button says."""
    return (
        page.get_by_role("list", name=name)
        .locator("li")
        .evaluate_all(
            "rows => rows.map(row => [...row.querySelectorAll('.name, small, .p, .l')].map(cell => cell.textContent))"
        )
    )


def completion(url: str, text: str, model: str, tokens: int = 12) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer) of the same question, asked without the page."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": tokens,
        "return_token_ids": True,
    }
    choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]
    return choice["prompt_token_ids"], choice["token_ids"]


def inspect(url: str, what: str, **body: Any) -> Any:
    answer = httpx.post(f"{url}/inspect/{what}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def visible(text: str) -> str:
    """A token as the page writes it where it stands alone."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return re.sub(r"^ +| +$", lambda run: "·" * len(run[0]), text) or "∅"


def percent(share: float) -> str:
    if share >= 0.0001:
        return f"{100 * share:.2f} %"
    return "<0.01 %" if share > 0 else "0.00 %"
