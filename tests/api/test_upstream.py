"""Models that another server answers for: beside another instance of this one, and scripted ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType

import pytest
from flask import Flask

from tests.api.conftest import events
from tests.api.live import live
from tests.fakes import FakeEngine, FakeLoader, fake_spec, say
from tests.scripted_upstream import answers, chunk, refuses, says, scripted_upstream
from transformers_api.app import create_app
from transformers_api.config.settings import Settings
from transformers_api.serving.models.spec import UpstreamSource

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = (
    chunk({"role": "assistant", "reasoning_content": "Hm."}),
    chunk({"content": "Let me see."}),
    chunk(
        {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "weather", "arguments": ""}}]}
    ),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
    chunk({}, "tool_calls"),
)
VECTOR = {"model": "far", "input": "a"}
MESSAGES = [{"role": "user", "content": "Hi"}]


def error(answer):
    return answer.json["error"]


@dataclass
class Front:
    """An application whose model "far" is that of an upstream."""

    app: Flask

    def __post_init__(self) -> None:
        self.client = self.app.test_client()

    def chat(self, **fields):
        body = {"messages": MESSAGES, "model": "far", **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt, **fields):
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})


def front_of(folder, url, entry=MappingProxyType({}), **settings) -> Front:
    entry = {"name": "far", "upstream": url, "upstream_model": "theirs", "timeout_s": 5, **entry}
    file = folder / "models.json"
    file.write_text(json.dumps([entry]))
    return Front(
        create_app(
            Settings(
                model_registry_path=file,
                include_default_models=False,
                default_model="far",
                model_store=folder,
                hf_home=folder,
                rate_limit_per_min=0,
                enable_embeddings_backend=True,
                **settings,
            ),
            FakeLoader(),
        )
    )


@pytest.fixture(scope="module")
def scripted():
    with scripted_upstream(says("ok")) as server:
        yield server


@pytest.fixture(scope="module")
def usual(tmp_path_factory, scripted):
    return front_of(tmp_path_factory.mktemp("front"), scripted.url)


@pytest.fixture
def far(tmp_path, scripted, usual):
    """Make (a front, the upstream, which answers with this script)."""

    def build(script, entry=MappingProxyType({}), **settings):
        scripted.script = script
        scripted.requests.clear()
        is_usual = not entry and not settings
        return usual if is_usual else front_of(tmp_path, scripted.url, entry, **settings), scripted

    return build


@pytest.fixture
def pair(serve) -> Iterator:
    """Make (a front, the server behind it): two instances of this very program."""
    with ExitStack() as stack:

        def build(engine: FakeEngine, **settings):
            behind = serve(engine)
            address = stack.enter_context(live(behind.app, "unused"))
            source = UpstreamSource(f"{address.url}/v1", "fake")
            return serve(specs=(fake_spec("far", source=source),), **settings), behind

        yield build


def test_a_chat_is_answered_by_the_upstream(pair):
    front, behind = pair(FakeEngine(say("Hello there!")))
    whole = front.chat(model="far", max_tokens=40, seed=5).json
    assert whole["choices"][0]["message"]["content"] == "Hello there!"
    assert whole["model"] == "far"
    assert whole["usage"]["completion_tokens"] == 13
    assert whole["usage"]["prompt_tokens"] > 5
    params = behind.params()
    assert (params.max_tokens, params.seed) == (40, 5)
    assert not front.engine.submitted


def test_a_stream_passes_piece_by_piece(pair):
    gate = threading.Semaphore(0)
    front, _ = pair(FakeEngine(say("Hello!"), gate=gate))
    response = front.chat(model="far", stream=True, stream_options={"include_usage": True})
    pieces = (line for line in response.response if b'"content":"' in line and b'""' not in line)
    for letter in b"Hel":
        gate.release()
        assert bytes([letter]) in next(pieces)
    gate.release(10)
    rest = list(response.response)
    assert json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 7
    assert rest[-1] == b"data: [DONE]\n\n"
    response.close()


def test_completions_of_several_prompts_have_their_texts_and_scores(pair):
    front, _ = pair(FakeEngine(say("ok")))
    answer = front.complete(["a", "b"], model="far", n=2, logprobs=1, echo=False).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in answer["choices"]} == {"ok"}
    scores = answer["choices"][2]["logprobs"]
    assert scores["tokens"] == ["o", "k"]
    assert scores["token_logprobs"] == [-0.5, -0.5]
    assert scores["text_offset"] == [1, 2]
    echoed = front.complete("a", model="far", echo=True).json
    assert echoed["choices"][0]["text"] == "aok"


def test_scores_of_a_chat_pass(pair):
    front, _ = pair(FakeEngine(say("ok")))
    answer = front.chat(model="far", logprobs=True, top_logprobs=2).json
    scores = answer["choices"][0]["logprobs"]["content"]
    assert [row["token"] for row in scores[:2]] == ["o", "k"]
    assert len(scores[0]["top_logprobs"]) == 2


def test_a_client_that_leaves_ends_the_upstreams_answer(pair):
    gate = threading.Semaphore(3)
    front, behind = pair(FakeEngine(lambda *_: iter(lambda: 65, 0), gate=gate))
    response = front.chat(model="far", stream=True)
    next(response.response)
    next(response.response)
    response.close()
    for _ in range(400):
        gate.release()
        if behind.engine.aborted:
            break
        threading.Event().wait(0.01)
    assert behind.engine.aborted


def test_the_key_and_the_models_name_are_the_operators(far, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "sk-theirs")
    front, upstream = far(says("ok"), {"api_key_env": "THEIR_KEY"})
    front.client.post(
        "/v1/chat/completions",
        json={"model": "far", "messages": MESSAGES},
        headers={"Authorization": "Bearer of-the-client"},
    )
    (request,) = upstream.requests
    assert request.headers["Authorization"] == "Bearer sk-theirs"
    assert request.path == "/v1/chat/completions"
    assert request.body["model"] == "theirs"
    assert request.body["stream"] is True
    assert "of-the-client" not in str(request.headers)


def test_only_what_a_client_sent_goes_on(far):
    front, upstream = far(says("ok"))
    sent = {"top_k": 5, "logit_bias": {"7": -1}, "stop": ["x"], "reasoning_effort": "low"}
    front.chat(model="far", response_format={"type": "json_object"}, tools=[WEATHER], **sent)
    body = upstream.requests[0].body
    assert {**body, **sent} == body
    assert body["tools"] == [WEATHER]
    assert body["response_format"] == {"type": "json_object"}
    assert set(body) == {
        *sent, "messages", "model", "stream", "stream_options", "response_format", "tools"
    }  # fmt: skip


def test_defaults_of_the_registry_entry_go_on(far):
    front, upstream = far(says("ok"), {"generation": {"temperature": 0.1}})
    front.chat()
    front.chat(temperature=0.9)
    assert [r.body["temperature"] for r in upstream.requests] == [0.1, 0.9]


def test_calls_and_thoughts_pass_in_every_dialect(far):
    front, upstream = far(answers(*CALL))
    message = front.chat(model="far", tools=[WEATHER]).json["choices"][0]
    assert message["finish_reason"] == "tool_calls"
    assert message["message"]["reasoning_content"] == "Hm."
    assert message["message"]["content"] == "Let me see."
    assert message["message"]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"a":1}',
    }
    assert events(front.chat(model="far", tools=[WEATHER], stream=True)).reasons() == [
        (0, "tool_calls")
    ]
    tools = [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}]
    body = {"model": "far", "messages": MESSAGES, "max_tokens": 50, "tools": tools}
    blocks = front.client.post("/v1/messages", json=body).json
    assert [block["type"] for block in blocks["content"]] == ["thinking", "text", "tool_use"]
    assert blocks["content"][2]["input"] == {"a": 1}
    assert blocks["stop_reason"] == "tool_use"
    assert blocks["usage"]["output_tokens"] == 3
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]
    body = {"model": "far", "input": "Hi", "tools": tools}
    items = front.client.post("/v1/responses", json=body).json["output"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    body = {"model": "far", "messages": MESSAGES, "tools": [WEATHER], "stream": False}
    line = front.client.post("/api/chat", json=body).json
    assert line["message"]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"a": 1},
    }
    assert all(r.body["tools"][0]["function"]["name"] == "weather" for r in upstream.requests)


def test_tokens_of_thoughts_and_of_caches_are_the_upstreams(far):
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "completion_tokens_details": {"reasoning_tokens": 6},
        "prompt_tokens_details": {"cached_tokens": 4},
    }

    def script(handler):
        handler.head()
        for payload in (chunk({"reasoning": "Hm"}), chunk({}, "stop"), {"usage": usage}, "[DONE]"):
            handler.event(payload)

    front, _ = far(script)
    for is_streamed in (False, True):
        options = {"stream_options": {"include_usage": True}} if is_streamed else {}
        answer = front.chat(stream=is_streamed, **options)
        counted = events(answer).payloads[-1]["usage"] if is_streamed else answer.json["usage"]
        assert counted["total_tokens"] == 17
        assert counted["completion_tokens_details"] == {"reasoning_tokens": 6}
        assert counted["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"trace": {"topk": 1}}, "trace"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stop_token_ids": [1]}, "stop_token_ids"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
def test_what_only_tokens_could_answer_is_refused_by_name(far, fields, param):
    front, upstream = far(says("ok"))
    answer = front.chat(model="far", **fields)
    assert answer.status_code == 400
    assert (error(answer)["code"], error(answer)["param"]) == ("model_not_capable", param)
    assert not upstream.requests


def test_prompts_of_token_ids_are_refused_by_name(far):
    front, _ = far(says("ok"))
    answer = front.complete([1, 2], model="far")
    assert (answer.status_code, error(answer)["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate", {"model": "far", "prompt": "x"}),
        ("/infill", {"model": "far", "input_prefix": "x", "input_suffix": "y"}),
        ("/tokenize", {"model": "far", "prompt": "x"}),
        ("/v1/models", {"model": "far"}),
        ("/v1/messages/count_tokens", {"model": "far", "messages": MESSAGES}),
    ],
)
def test_routes_that_need_the_model_itself_refuse_it(far, route, body):
    front, _ = far(says("ok"))
    answer = front.client.post(route, json=body)
    assert answer.status_code == 400, answer.text
    assert "upstream" in answer.text or "cannot be inspected" in answer.text


def test_nobody_looks_inside_it(far):
    front, _ = far(says("ok"))
    answer = front.client.post("/inspect/tokens", json={"model": "far", "prompt": "x"})
    assert (answer.status_code, answer.json["code"]) == (422, "model_not_capable")


def test_a_trace_that_is_not_required_is_left_out(far):
    front, _ = far(says("ok"))
    answer = front.chat(model="far", trace={"topk": 1, "required": False})
    assert answer.json["choices"][0]["message"]["content"] == "ok"


def test_the_list_of_models_shows_it(far):
    front, upstream = far(says("ok"))
    models = {model["id"]: model for model in front.client.get("/v1/models").json["data"]}
    assert models["far"]["owned_by"] == "upstream"
    assert models["far"]["loaded"] is True
    assert upstream.url not in front.client.get("/v1/models").text


# -- faults


def test_an_upstream_that_dies_in_the_middle_ends_the_stream_with_an_error(far):
    def dies(handler):
        handler.head()
        handler.event(chunk({"content": "half"}))

    front, _ = far(dies)
    stream = events(front.chat(model="far", stream=True))
    assert not stream.done
    assert stream.text() == "half"
    assert stream.payloads[-1]["error"]["code"] == "upstream_failed"
    whole = front.chat(model="far")
    assert (whole.status_code, error(whole)["code"]) == (502, "upstream_failed")


@pytest.mark.parametrize(
    "payload",
    [
        "{",
        "[]",
        '{"choices": 5}',
        '{"choices": [{"index": 7, "delta": {}}]}',
        '{"choices": [{"index": 0, "delta": {"content": 5}}]}',
        '{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 3}]}}]}',
        '{"choices": [{"index": true, "delta": {}}]}',
        '{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {}}]}}]}',
    ],
)
def test_nonsense_is_an_error_and_no_answer(far, payload):
    front, _ = far(answers(payload))
    answer = front.chat(model="far")
    assert (answer.status_code, error(answer)["code"]) == (502, "upstream_failed")


def test_an_error_inside_a_stream_ends_it(far):
    front, _ = far(answers(chunk({"content": "a"}), {"error": {"message": "no\nmemory"}}))
    stream = events(front.chat(model="far", stream=True))
    assert not stream.done
    assert "no memory" in stream.payloads[-1]["error"]["message"]


def test_a_silent_upstream_is_a_504(far):
    front, upstream = far(lambda handler: handler.is_left(), {"timeout_s": 0.2})
    answer = front.chat(model="far")
    assert (answer.status_code, error(answer)["code"]) == (504, "upstream_timeout")
    assert len(upstream.requests) == 1


def test_an_upstream_that_falls_silent_in_the_middle_is_given_up(far):
    left = threading.Event()

    def hangs(handler):
        handler.head()
        handler.event(chunk({"content": "a"}))
        if handler.is_left():
            left.set()

    front, _ = far(hangs, {"timeout_s": 2})  # time to begin, on a busy machine too
    stream = events(front.chat(model="far", stream=True))
    assert stream.payloads[-1]["error"]["code"] == "upstream_timeout"
    assert left.wait(30)


def test_the_deadline_of_requests_holds_for_upstreams(far):
    front, _ = far(lambda handler: handler.is_left(), request_timeout_s=0.2)
    answer = front.chat(model="far")
    assert (answer.status_code, error(answer)["code"]) == (504, "deadline_exceeded")


def test_an_upstream_that_is_not_there_is_a_502(tmp_path):
    answer = front_of(tmp_path, "http://127.0.0.1:9/v1").chat()
    assert (answer.status_code, error(answer)["code"]) == (502, "upstream_failed")
    assert "127.0.0.1" not in answer.text


@pytest.mark.parametrize(
    ("status", "body", "headers", "expected"),
    [
        (429, {"error": {"message": "slow down"}}, {"Retry_After": "7"}, (429, "upstream_busy")),
        (503, {"error": {"message": "loading"}}, {"Retry_After": "9"}, (503, "unavailable")),
        (401, {"error": {"message": "key sk-secret123"}}, {}, (502, "upstream_failed")),
        (404, {"error": {"message": "no model"}}, {}, (502, "upstream_failed")),
        (500, b"<html>", {}, (502, "upstream_failed")),
        (504, b"", {}, (504, "upstream_timeout")),
        (302, b"", {"Location": "http://169.254.169.254/"}, (502, "upstream_failed")),
        (400, {"error": {"message": "bad top_k", "param": "top_k"}}, {}, (400, None)),
        (
            400,
            {"error": {"message": "too long", "code": "context_length_exceeded"}},
            {},
            (400, "context_length_exceeded"),
        ),
        (200, b"{}", {}, (502, "upstream_failed")),
    ],
)
def test_an_upstreams_status_has_one_of_ours(far, status, body, headers, expected):
    front, upstream = far(refuses(status, body, **headers))
    for is_streamed in (False, True):
        answer = front.chat(model="far", stream=is_streamed)
        assert (answer.status_code, error(answer)["code"]) == expected
        assert answer.headers.get("Retry-After") == headers.get("Retry_After")
        assert "secret" not in answer.text
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("wait", ["9" * 5000, "1e9", "-1", "Sun, 29 Nov 2026 14:00:00 GMT"])
def test_a_wait_that_is_no_number_of_seconds_is_one(far, wait):
    front, _ = far(refuses(429, b"", Retry_After=wait))
    for answer in (front.chat(), front.client.post("/v1/embeddings", json=VECTOR)):
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")


def test_headers_that_drip_are_waited_for_no_longer_than_silence(far):
    left = threading.Event()

    def drips(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not handler.is_left(0.02):
            handler.wfile.write(b"X-A: b\r\n")
        left.set()

    front, _ = far(drips, {"timeout_s": 0.2})
    answer = front.chat()
    assert (answer.status_code, error(answer)["code"]) == (504, "upstream_timeout")
    assert left.wait(30)


def test_a_line_that_comes_byte_by_byte_is_read(far):
    def bytewise(handler):
        handler.head()
        data = f"data: {json.dumps(chunk({'content': 'ok'}, 'stop'))}\r\n\r\ndata: [DONE]\n\n"
        for byte in data.encode():
            handler.wfile.write(bytes([byte]))

    front, _ = far(bytewise)
    assert front.chat().json["choices"][0]["message"]["content"] == "ok"


def test_more_than_an_answer_may_have_is_not_read(far):
    def floods(handler):
        handler.head()
        try:
            while True:
                handler.wfile.write(b"x" * (1 << 20))
        except OSError:
            return

    front, _ = far(floods)
    answer = front.chat(model="far")
    assert (answer.status_code, error(answer)["code"]) == (502, "upstream_failed")


def test_no_client_chooses_where_its_request_goes(far):
    front, _ = far(says("ok"))
    answer = front.chat(model="http://127.0.0.1:1/v1")
    assert (answer.status_code, error(answer)["code"]) == (404, "model_not_found")


# -- vectors


def test_vectors_are_the_upstreams(far):
    data = [{"index": i, "embedding": [float(i), 0.5]} for i in (1, 0)]
    body = {"data": data, "usage": {"prompt_tokens": 4}, "extra": 1}
    front, upstream = far(refuses(200, body))
    answer = front.client.post("/v1/embeddings", json={"model": "far", "input": ["a", "b"]}).json
    assert [row["embedding"] for row in answer["data"]] == [[0.0, 0.5], [1.0, 0.5]]
    assert answer["model"] == "far"
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert upstream.requests[0].path == "/v1/embeddings"
    one = front.client.post("/v1/embeddings", json={"model": "far", "input": "a"})
    assert (one.status_code, error(one)["code"]) == (502, "upstream_failed")
    ids = front.client.post("/v1/embeddings", json={"model": "far", "input": [[1]]})
    assert (ids.status_code, error(ids)["param"]) == (400, "input")
