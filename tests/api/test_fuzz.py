"""Malformed and mutated bodies: never a 5xx, and every refusal is in the dialect of its route."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SEEDS = {
    "/v1/chat/completions": {
        "model": "fake",
        "messages": [
            {"role": "system", "content": "S", "name": "n"},
            {"role": "user", "content": [{"type": "text", "text": "U"}]},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "n": 2,
        "seed": 3,
        "stop": ["x", "y"],
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"65": 1},
        "stream": False,
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"a": 1},
    },
    "/v1/completions": {
        "model": "fake",
        "prompt": ["Hi", "Ho"],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 4,
        "n": 1,
        "best_of": 2,
        "stop": "x",
        "presence_penalty": 0.5,
        "stop_token_ids": [66],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/models": {"model": "fake", "device": "cpu"},
    "/tokenize": {"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": True},
    "/detokenize": {"tokens": [65, 66]},
    "/chat/stream": {
        "model": "fake",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        "max_new_tokens": 2,
        "temperature": 0.9,
        "top_k": 5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x", "y"],
        "trace_layer": 1,
        "trace": {
            "layers": [0, 1],
            "heads": [0, 3],
            "attn": "topk",
            "attn_topk": 4,
            "topk": 3,
            "lens": {"layers": "every:1", "topk": 2},
            "resid_norms": True,
            "meta": True,
        },
    },
    "/inspect/full_attn": {
        "messages": [{"role": "user", "content": "U"}],
        "trace_layer": 1,
        "head": "mean",
        "max_new_tokens": 2,
        "temperature": 0,
        "seed": 3,
        "rows": [0, 9],
        "cols": [3, 9],
        "downsample": [2, 2],
        "reduce": "max",
        "format": "u8",
    },
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def places(value, path=()):
    """Every place inside a body."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def mutated(draw):
    url = draw(st.sampled_from(sorted(SEEDS)))
    body = SEEDS[url]
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(body))))
        body = replaced(body, path, draw(anything))
    return url, json.dumps(body).encode()


@st.composite
def broken(draw):
    url = draw(st.sampled_from(sorted(SEEDS)))
    raw = bytearray(json.dumps(SEEDS[url]).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw) - 1))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return url, bytes(raw)


def refused_by_openai(status, body, raw):
    assert status in (400, 404), (raw, body)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def refused_by_niels(status, body, raw):
    assert status in (404, 413, 422), (raw, body)
    assert body.keys() == {"error", "code"} if status != 422 else body.keys() <= {"detail", "code"}
    assert body["detail" if status == 422 else "error"]


@pytest.mark.parametrize("bodies", [mutated(), broken()], ids=["mutated", "broken"])
def test_no_body_makes_the_server_fail(served, bodies):
    seen = set()

    @settings(
        max_examples=250,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(bodies)
    def check(request):
        url, raw = request
        response = served.client.post(url, data=raw, content_type="application/json")
        text = response.get_data(as_text=True)
        response.close()
        seen.add(response.status_code)
        if response.status_code == 200:
            assert '"error"' not in text or "event-stream" not in response.content_type
        else:
            is_inspected = url.startswith(("/chat/stream", "/inspect/"))
            (refused_by_niels if is_inspected else refused_by_openai)(
                response.status_code, json.loads(text), raw
            )

    check()
    assert {200, 400, 422} <= seen
    assert served.swapper.status().leases == 0
