"""Reading bodies: what curl, browsers and odd clients send."""

import json

import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize")


def error(response, status=400):
    assert response.status_code == status, response.get_data(as_text=True)
    body = response.get_json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "text/plain", "application/json"]
)
def test_a_body_is_json_whatever_curl_says(served, content_type):
    response = served.client.post(
        "/v1/chat/completions", data=json.dumps(CHAT), content_type=content_type
    )
    assert response.status_code == 200


def test_a_web_page_has_to_say_json(served):
    response = served.client.post(
        "/v1/models",
        data=json.dumps({"model": "fake"}),
        content_type="text/plain",
        headers={"Origin": "http://elsewhere.example"},
    )
    assert "Content-Type" in error(response)["message"]
    assert served.loader.count("load") == 0


def test_json_with_an_origin_is_fine(served):
    headers = {"Origin": "http://localhost:3000"}
    response = served.client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "raw",
    [b"", b"  ", b"[]", b'"text"', b"1", b"null", b"{", b"\xff", b'{"a":1,"a":2}', b"[" * 9999],
)
def test_a_body_that_is_no_object_is_400(served, url, raw):
    body = error(served.client.post(url, data=raw, content_type="application/json"))
    assert body["type"] == "invalid_request_error"
    assert "body" in body["message"]


def test_a_byte_order_mark_is_fine(served):
    raw = b"\xef\xbb\xbf" + json.dumps(CHAT).encode()
    response = served.client.post("/v1/chat/completions", data=raw)
    assert response.status_code == 200


def test_a_long_body_is_413(served):
    raw = json.dumps({"prompt": "x" * (3 << 20)})
    body = error(served.client.post("/v1/completions", data=raw), 413)
    assert body["code"] == "payload_too_large"


def test_a_long_chunked_body_is_413_and_not_cut(served):
    """A complete JSON text within the limit, and then some: werkzeug hands over the first part."""
    from io import BytesIO

    limit = served.app.config["MAX_CONTENT_LENGTH"]
    raw = json.dumps({"prompt": "Hi"}).encode()
    raw += b" " * (limit + 100 - len(raw))
    response = served.client.post(
        "/v1/completions",
        input_stream=BytesIO(raw),
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert error(response, 413)["code"] == "payload_too_large"
    assert served.engine.submitted == []


def test_a_long_prompt_is_413_and_names_the_field(serve):
    served = serve(max_prompt_bytes=10)
    assert error(served.complete("x" * 11), 413)["param"] == "prompt"
    assert error(served.complete(["x" * 6, "ä" * 3]), 413)["param"] == "prompt"
    assert error(served.chat("x" * 11), 413)["param"] == "messages"
    parts = [{"type": "text", "text": "x" * 6}] * 2
    assert error(served.chat(parts), 413)["param"] == "messages"
    tokenize = served.client.post("/tokenize", json={"text": "x" * 11})
    assert error(tokenize, 413)["param"] == "text"
    assert served.loader.calls == []
    assert served.complete("x" * 10).status_code == 200
