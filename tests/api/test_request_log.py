"""One line for each request, at its end, with what happened and without what was said."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from tests.fakes import FakeEngine, say
from tests.metrics_app import lines_of, logged, make_app, post
from transformers_api.errors import EngineFailed, Overloaded

CANARY = "canary-of-the-prompt"
SAID = "canary-of-the-answer"
CHAT = {"messages": [{"role": "user", "content": CANARY}]}


def requests_of(text):
    return lines_of(text, "request")


@pytest.fixture
def served(tmp_path):
    def make(engine=None, **settings):
        app, _ = make_app(tmp_path, {"one": engine or FakeEngine(say(SAID))}, **settings)
        return app.test_client()

    return make


def test_an_answer_is_told_with_its_tokens_times_and_reason(served):
    with logged() as text:
        assert post(served(), **CHAT) == 200
    (line,) = requests_of(text)
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["model"] == "one"
    assert line["completion_tokens"] == len(SAID) + 1
    assert line["model_wait_ms"] >= 0
    assert line["prompt_tokens"] > len(CANARY)
    assert line["finish_reason"] == "stop"
    assert 0 <= line["ttft_ms"] <= line["duration_ms"]
    assert line["request_id"]
    assert not {"stream", "error", "client_gone", "path"} & set(line)


def test_a_stream_is_told_at_its_end_and_not_before(served):
    gate = threading.Semaphore(0)
    client = served(FakeEngine(say(SAID), gate=gate), keepalive_s=5)
    with logged() as text:
        response = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        events = iter(response.response)
        next(events)
        assert requests_of(text) == []
        gate.release(100)
        assert b"".join(events).endswith(b"[DONE]\n\n")
        assert requests_of(text) == []
        response.close()
    (line,) = requests_of(text)
    assert (line["status"], line["stream"], line["finish_reason"]) == (200, True, "stop")
    assert line["completion_tokens"] == len(SAID) + 1
    assert "client_gone" not in line


def test_a_client_that_leaves_a_stream_is_told(served):
    gate = threading.Semaphore(3)
    client = served(FakeEngine(say(SAID), gate=gate), keepalive_s=5)
    with logged() as text:
        response = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        next(iter(response.response))
        response.close()
    (line,) = requests_of(text)
    assert (line["client_gone"], line["error"], line["status"]) == (True, "client_gone", 200)
    assert "finish_reason" not in line


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/chat/stream"])
def test_an_error_in_the_middle_of_a_stream_is_told(served, route):
    engine = FakeEngine(say(SAID), error=EngineFailed("broken"), error_after=3)
    body = {**CHAT, "trace_layer": 0} if route == "/chat/stream" else {**CHAT, "stream": True}
    with logged() as text:
        assert post(served(engine), route, **body) == 200
    (line,) = requests_of(text)
    assert (line["error"], line["status"]) == ("engine_failed", 200)
    assert line["completion_tokens"] == 3


def test_refusals_are_told_with_their_code(served):
    with logged() as text:
        client = served(FakeEngine(refusal=Overloaded("no")))
        assert post(client, **CHAT) == 429
        assert post(client, **CHAT, temperature="hot") == 400
        client.get("/nowhere").close()
    told = [(line["status"], line["error"], line["route"]) for line in requests_of(text)]
    assert told == [
        (429, "queue_full", "/v1/chat/completions"),
        (400, "invalid_request", "/v1/chat/completions"),
        (404, "not_found", "none"),
    ]


def broken(prompt, _params, _index):
    raise ValueError(f"cannot say {CANARY}")


ROUTES = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": CANARY, "echo": True, "logprobs": 1}),
    ("/generate", {"prompt": CANARY}),
    ("/chat/stream", {**CHAT, "trace_layer": 0}),
    ("/inspect/tokens", {"prompt": CANARY}),
    ("/tokenize", {"prompt": CANARY}),
    ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": "x"}]}),
    ("/v1/completions", {"prompt": "x", "temperature": CANARY}),
    ("/v1/completions", {"prompt": CANARY, "model": "unknown"}),
]


def test_nothing_that_was_said_is_in_the_log_at_its_most_talkative(served):
    client = served(rate_limit_per_min=0)
    with logged(logging.DEBUG) as text:
        for route, body in ROUTES:
            post(client, route, **body)
        client.get("/inspect/model").close()
    assert len(requests_of(text)) == len(ROUTES) + 1
    assert "canary" not in text.getvalue()


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_logged_without_what_it_quotes(served, stream):
    client = served(FakeEngine(broken))
    with logged() as text:
        post(client, **CHAT, stream=stream)
    (line,) = lines_of(text, "Unexpected error")
    assert "canary" not in text.getvalue()
    assert "in broken" in line["trace"]
    assert "ValueError" in line["trace"]
    assert line["request_id"] == requests_of(text)[0]["request_id"]
    with logged(shows_texts=True) as text:
        post(client, **CHAT, stream=stream)
    assert CANARY in lines_of(text, "Unexpected error")[0]["trace"]


def test_log_prompts_shows_what_was_said(served):
    with logged() as text:
        assert post(served(log_prompts=True), **CHAT) == 200
    (line,) = requests_of(text)
    assert CANARY in line["prompt"]
    assert SAID in line["completion"]


def test_keys_and_forged_ids_stay_out_of_the_log(served):
    client = served()
    headers = [
        {"Authorization": "Bearer sk-secret-secret"},
        {"X-Api-Key": "sk-secret-secret"},
        {"X-Request-Id": "sk-secret\\nforged"},
    ]
    with logged() as text:
        for given in headers:
            client.get("/v1/models/one", headers=given).close()
        client.get("/hf_abcdefgh12345/\n{%22level%22:1}").close()
    assert "secret" not in text.getvalue()
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert len(lines) == 4
    assert lines[-1]["path"].startswith("/***")
    assert {line["level"] for line in lines} == {"info"}
