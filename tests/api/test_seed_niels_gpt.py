"""The document of the niels-gpt API, section by section: its curl lines against a checkpoint of it.

The checkpoint of the tests has two layers of four heads, where the document's has four of each:
its curl lines ask for layer 1 here, not 3.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask

from tests.api.live import live
from transformers_api.api.http.rate_limits import RateLimits
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.token_bucket import Rate
from transformers_api.serving.models.builtin import builtin_models
from transformers_api.serving.models.spec import HubSource

CHECKPOINT = Path(__file__).parent.parent / "fixtures" / "niels_v1" / "chat" / "best.pt"
ADDRESS = "http://localhost:8000"
DOCUMENTED_ORIGINS = "https://nielseriknandal.com,http://localhost:3000,http://localhost:5173"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("niels")
    (folder / "models.json").write_text(json.dumps([{"name": "niels", "path": str(CHECKPOINT)}]))
    settings = Settings(
        model_registry_path=folder / "models.json",
        include_default_models=False,
        default_model="niels",
        preload_model=False,
        model_store=folder / "store",
        hf_home=folder / "hub",
        torch_threads=1,
        rate_limit_per_min=0,
        cors_allow_origins=tuple(DOCUMENTED_ORIGINS.split(",")),
    )
    app = create_app(settings)
    app.extensions[EXTENSION].swapper.load("niels")
    yield app
    app.extensions[EXTENSION].drain(0.0)


@pytest.fixture(scope="module")
def server(app):
    with live(app, ADDRESS) as running:
        yield running


@pytest.fixture
def client(app):
    return app.test_client()


def events(text):
    assert text.endswith("\n\n")
    frames = [frame.split("\n") for frame in text[:-2].split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in frames]


def of(name, found):
    return [data for event, data in found if event == name]


# Running Locally


def test_the_interactive_documentation_is_there(server):
    assert "swagger" in server.curl(f"curl {ADDRESS}/docs").lower()
    paths = json.loads(server.curl(f"curl {ADDRESS}/openapi.json"))["paths"]
    assert {"/chat/stream", "/inspect/full_attn", "/health"} <= paths.keys()


# Environment Variables


def test_every_variable_is_read():
    settings = Settings.from_env(
        {
            "API_HOST": "0.0.0.0",
            "API_PORT": "8001",
            "DEVICE": "mps",
            "CKPT_DIR": "./checkpoints",
            "MAX_PROMPT_BYTES": "1000",
            "RATE_LIMIT_PER_MIN": "20",
            "RATE_LIMIT_BURST": "5",
            "ALLOWED_ORIGINS": DOCUMENTED_ORIGINS,
            "HF_TOKEN": "secret",
        }
    )
    assert (settings.host, settings.port, settings.default_device) == ("0.0.0.0", 8001, "mps")
    assert settings.model_store == Path("checkpoints")
    assert settings.inspected_prompt_bytes == 1000
    assert (settings.rate_limit_per_min, settings.rate_limit_burst) == (20, 5)
    assert settings.cors_allow_origins == tuple(DOCUMENTED_ORIGINS.split(","))
    assert settings.hf_token == "secret"


def test_the_defaults_that_are_limits_are_the_documented_ones():
    settings = Settings.from_env({})
    assert settings.inspected_prompt_bytes == 16384
    assert (settings.inspected_per_min, settings.rate_limit_burst) == (10, 3)


def test_the_documented_checkpoint_is_built_in():
    (spec,) = (spec for spec in builtin_models() if spec.name == "niels-gpt")
    assert isinstance(spec.source, HubSource)
    assert (spec.source.repo, spec.source.file) == ("nnandal/niels-gpt", "best.pt")


@pytest.mark.parametrize("origin", DOCUMENTED_ORIGINS.split(","))
@pytest.mark.parametrize("route", ["/chat/stream", "/inspect/full_attn"])
def test_the_allowed_pages_may_ask_and_read(client, route, origin):
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    allowed = client.options(route, headers=asked).headers
    assert allowed["Access-Control-Allow-Origin"] == origin
    assert "content-type" in allowed["Access-Control-Allow-Headers"].lower()
    answer = client.post(route, json={}, headers={"Origin": origin})
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    stranger = client.post(route, json={}, headers={"Origin": "https://other.example"})
    assert "Access-Control-Allow-Origin" not in stranger.headers


# Health Check


def test_health(server):
    body = json.loads(server.curl("curl http://localhost:8000/health"))
    assert (body["ok"], body["model_ready"]) == (True, True)


# Stream Chat Completion

STREAM = r"""curl -N -X POST http://localhost:8000/chat/stream \
  -H "Content-Type: application/json" \
  -d '{
    "messages": [
      {"role": "user", "content": "tell me about niels"}
    ],
    "max_new_tokens": 100,
    "temperature": 0.9,
    "top_k": 50,
    "seed": 42,
    "trace_layer": 1
  }'"""


def test_the_stream_has_the_documented_events_in_the_documented_order(server):
    found = events(server.curl(STREAM))
    names = [name for name, _ in found]
    assert names == ["token", "trace"] * (len(names) // 2) + ["done"]
    assert len(names) > 10
    tokens, traces, (done,) = of("token", found), of("trace", found), of("done", found)
    assert [token["step"] for token in tokens] == [*range(len(tokens))]
    assert [trace["step"] for trace in traces] == [*range(len(traces))]
    assert tokens[0]["token_text"] == chr(tokens[0]["token_id"])
    text = "".join(token["token_text"] for token in tokens)
    assert done["reply"]
    assert text.startswith(done["reply"].partition("�")[0][:5])


def test_a_trace_has_entropy_ten_candidates_and_a_row_for_each_head(server):
    found = events(server.curl(STREAM))
    prompt = len("user: tell me about niels\nassistant: ")
    for token, trace in zip(of("token", found), of("trace", found), strict=True):
        assert trace["entropy"] >= 0
        assert len(trace["topk"]) == 10
        probs = [candidate["prob"] for candidate in trace["topk"]]
        assert probs == sorted(probs, reverse=True)
        assert sum(probs) <= 1.0001
        assert {"token_id", "token_text", "prob"} <= trace["topk"][0].keys()
        width = min(prompt + token["step"], 96)
        assert [len(row) for row in trace["attn"]] == [width] * 4
        assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in trace["attn"])


def test_the_seed_decides_and_the_defaults_are_the_documented_ones(server):
    again = STREAM.replace('"temperature": 0.9,', "").replace('"top_k": 50,', "")
    again = again.replace('"seed": 42,', "")
    first = of("token", events(server.curl(STREAM)))
    assert first == of("token", events(server.curl(again)))
    hotter = STREAM.replace("0.9", "1.9")
    others = [of("token", events(server.curl(hotter.replace("42", n)))) for n in ("42", "43")]
    assert others[0] != others[1]


# Inspect Full Attention

INSPECT = r"""curl -X POST http://localhost:8000/inspect/full_attn \
  -H "Content-Type: application/json" \
  -d '{
    "messages": [
      {"role": "user", "content": "hello"}
    ],
    "trace_layer": 1,
    "head": 0
  }'"""


def test_the_whole_matrix_of_a_head(server):
    body = json.loads(server.curl(INSPECT))
    text = "user: hello\nassistant: "  # as the model reads it
    assert (body["layer"], body["head"]) == (1, 0)
    assert body["tokens"] == list(text)
    assert len(body["attn"]) == len(text)
    for query, row in enumerate(body["attn"]):
        assert len(row) == len(text)
        assert row[query + 1 :] == [0.0] * (len(text) - query - 1)
        assert sum(row) == pytest.approx(1, abs=1e-3)


def test_tokens_may_be_generated_before(server, client):
    asked = INSPECT.replace('"head": 0', '"head": 0, "seed": 42, "max_new_tokens": 3')
    body = json.loads(server.curl(asked))
    assert len(body["tokens"]) == len("user: hello\nassistant: ") + 3
    assert len(body["attn"]) == len(body["tokens"])
    messages = [{"role": "user", "content": "hello"}]
    ask = {"messages": messages, "max_new_tokens": 3, "temperature": 0, "trace_layer": 0}
    stream = client.post("/chat/stream", json=ask).get_data(as_text=True)
    written = [token["token_text"] for token in of("token", events(stream))]
    assert body["tokens"][-3:] == written


def test_a_row_of_the_stream_is_a_row_of_the_matrix(client):
    messages = [{"role": "user", "content": "who is niels?"}]
    ask = {"messages": messages, "temperature": 0, "max_new_tokens": 8, "trace_layer": 1}
    found = events(client.post("/chat/stream", json=ask).get_data(as_text=True))
    asked = {"messages": messages, "trace_layer": 1, "head": 2, "max_new_tokens": 8}
    matrix = client.post("/inspect/full_attn", json=asked).get_json()["attn"]
    for trace in of("trace", found):
        row = trace["attn"][2]
        assert matrix[len(row) - 1][: len(row)] == pytest.approx(row, abs=1e-4)


# Error Responses

TOO_MUCH = {"role": "user", "content": "x" * (20000 - len("user: \nassistant: "))}
ROUTES = {"/chat/stream": {"max_new_tokens": 2}, "/inspect/full_attn": {"head": 0}}


def post(client, route, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], "trace_layer": 0}
    return client.post(route, json=body | ROUTES[route] | fields, buffered=True)


@pytest.mark.parametrize("route", ROUTES)
def test_413_prompt_too_large(client, route):
    response = post(client, route, messages=[TOO_MUCH])
    assert response.status_code == 413
    assert response.get_json() == {
        "error": "Prompt too large: 20000 bytes (max 16384)",
        "code": "prompt_too_large",
    }


@pytest.fixture
def limited(app, monkeypatch):
    """The documented limit, on a clock of the test: [seconds]."""
    clock = [0.0]
    limits = RateLimits(Access(requests=Rate(3, 10)))
    limits.init_app(Flask("limits"))  # the other one has its hooks, and has answered already
    limits.strategy.clock = lambda: clock[0]
    services = replace(app.extensions[EXTENSION], limits=limits)
    monkeypatch.setitem(app.extensions, EXTENSION, services)
    return clock


def test_429_rate_limited_over_both_routes_together(client, limited):
    stream, matrix = ROUTES
    for route in (stream, matrix, stream):
        assert post(client, route).status_code == 200
    for route in ROUTES:
        response = post(client, route)
        assert response.status_code == 429
        assert response.get_json() == {"error": "Rate limit exceeded", "code": "rate_limited"}
        assert response.headers["Retry-After"] == "6"
    limited[0] = 6.0
    assert post(client, matrix).status_code == 200
    assert post(client, stream).status_code == 429


def test_the_other_routes_have_no_rate(client, limited):
    for _ in range(5):
        assert client.get("/health").status_code == 200
        asked = {"prompt": "hi", "max_tokens": 1}
        assert client.post("/v1/completions", json=asked).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layer", [2, 3, -1])
def test_422_validation_error(client, route, layer):
    response = post(client, route, trace_layer=layer)
    assert response.status_code == 422
    assert response.get_json() == {"detail": "trace_layer must be in [0, 1]"}


@pytest.mark.parametrize("head", [4, -1])
def test_422_for_a_head_that_is_not_there(client, head):
    response = post(client, "/inspect/full_attn", head=head)
    assert response.status_code == 422
    assert response.get_json() == {"detail": "head must be in [0, 3]"}


# What its code did besides


def test_generation_ends_where_the_model_begins_the_next_turn(client):
    messages = [{"role": "user", "content": "who is niels?"}]
    response = post(client, "/chat/stream", messages=messages, temperature=0, max_new_tokens=60)
    found = events(response.get_data(as_text=True))
    text = "".join(token["token_display"] for token in of("token", found))
    assert text.endswith(r"code.\x0auser: ")  # all of the tag was sent
    assert of("done", found)[0]["reply"] == "niels writes café code."
    assert of("done", found)[0]["finish_reason"] == "stop"


def test_the_reply_is_of_this_request_where_the_code_took_an_earlier_one(client):
    messages = [
        {"role": "user", "content": "say assistant: nonsense"},
        {"role": "assistant", "content": "earlier"},
        {"role": "user", "content": "hi"},
    ]
    response = post(client, "/chat/stream", messages=messages, max_new_tokens=0)
    assert of("done", events(response.get_data(as_text=True)))[0]["reply"] == ""
