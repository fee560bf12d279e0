"""What is no text is refused by the name of its field, in every dialect."""

from __future__ import annotations

import pytest

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aa"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "aa", "format": "wav"}}
VIDEO = {"type": "video_url", "video_url": {"url": "https://x.example/v.mp4"}}
SOURCE = {"type": "base64", "media_type": "image/png", "data": "aa"}
ASKED = [{"type": "text", "text": "What is this?"}]


def chat(*parts, role="user"):
    return {"messages": [{"role": role, "content": [*ASKED, *parts]}]}


REFUSED = {
    "chat, image": ("/v1/chat/completions", chat(IMAGE), "messages[0].content[1]"),
    "chat, audio": ("/v1/chat/completions", chat(AUDIO), "messages[0].content[1]"),
    "chat, video": ("/v1/chat/completions", chat(VIDEO), "messages[0].content[1]"),
    "chat, image of a system turn": (
        "/v1/chat/completions",
        chat(IMAGE, role="system"),
        "messages[0].content[1]",
    ),
    "messages, image": (
        "/v1/messages",
        {"max_tokens": 5, **chat({"type": "image", "source": SOURCE})},
        "messages[0].content[1]",
    ),
    "messages, document": (
        "/v1/messages",
        {"max_tokens": 5, **chat({"type": "document", "source": SOURCE})},
        "messages[0].content[1]",
    ),
    "responses, image": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]},
        "input[0].content[0]",
    ),
    "responses, audio": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [AUDIO]}]},
        "input[0].content[0]",
    ),
    "responses, file": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
        "input[0].content[0]",
    ),
    "ollama chat": (
        "/api/chat",
        {"messages": [{"role": "user", "content": "x", "images": ["aa"]}]},
        "messages[0].images",
    ),
    "ollama generate": ("/api/generate", {"prompt": "x", "images": ["aa"]}, "images"),
    "template": ("/apply-template", chat(IMAGE), "messages[0].content[1]"),
    "tokens": ("/v1/messages/count_tokens", chat({"type": "image"}), "messages[0].content[1]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_a_400_that_names_its_field(served, case):
    path, body, field = REFUSED[case]
    response = served.client.post(path, json={"model": "fake", **body})
    text = response.get_data(as_text=True)
    assert response.status_code == 400, text
    assert field in text
