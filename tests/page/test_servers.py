"""The servers of these tests answer as a page needs it."""

from __future__ import annotations

import httpx


def test_the_scripted_model_says_what_it_is_told_and_goes_on_from_token_ids(scripted):
    answer = httpx.post(
        f"{scripted}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "<b>hello</b>"}], "return_token_ids": True},
        timeout=30,
    ).json()
    assert answer["choices"][0]["message"]["content"] == "<b>hello</b>"
    prompt = answer["choices"][0]["prompt_token_ids"]
    rest = httpx.post(
        f"{scripted}/v1/completions", timeout=30, json={"prompt": [*prompt, *b"<b>he"]}
    ).json()
    assert rest["choices"][0]["text"] == "llo</b>"


def test_a_browser_meets_no_complaint_where_there_is_none(tiny, open_page):
    page = open_page(tiny, "/docs")
    assert page.title()
