"""Malformed and mutated bodies: never a 5xx, and every refusal has the error object."""

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
        assert response.status_code in (200, 400, 404), (raw, text)
        if response.status_code == 200:
            assert '"error"' not in text or "event-stream" not in response.content_type
            return
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]

    check()
    assert {200, 400} <= seen
    assert served.swapper.status().leases == 0
