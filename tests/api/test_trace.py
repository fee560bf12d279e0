"""The field ``trace``: what it adds to completions, what it refuses, and what it leaves alone."""

import base64
import bisect
import json
from contextlib import suppress

import httpx2
import numpy
import openai
import pytest

from tests.api.conftest import events
from tests.api.test_streams import Client
from tests.fake_inspection import HEADS, FakeInspector, fake_anatomy, weights
from tests.fakes import fake_model, say
from transformers_api.api.http.disconnect import DisconnectWatcher
from transformers_api.api.trace.schema import TraceOptions
from transformers_api.config.settings import Settings
from transformers_api.errors import InvalidRequest
from transformers_api.serving.inspect import trace_plan

MESSAGES = [{"role": "user", "content": "Hi"}]
ROUTES = ["chat", "complete"]


@pytest.fixture
def watcher(request):
    """Of the test that says when its client leaves; else the one that watches."""
    return Client() if "client" in request.fixturenames else DisconnectWatcher()


@pytest.fixture
def client(watcher):
    return watcher


@pytest.fixture
def sdk(served):
    """The real SDK against the application."""
    served.engine.reply = say("Hello!")
    transport = httpx2.WSGITransport(served.app)
    with openai.OpenAI(
        base_url="http://testserver/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    ) as client:
        yield client


def streamed(sdk, trace, **options):
    options = {"model": "fake", "messages": MESSAGES, "extra_body": {"trace": trace}} | options
    with sdk.chat.completions.create(stream=True, **options) as stream:
        return list(stream)


def post(served, route, stream=False, **fields):
    return getattr(served, route)("Hi", stream=stream, **fields)


def steps_of(body, index=0):
    return body["choices"][index]["trace"]["steps"]


def unpack(shown):
    raw = numpy.frombuffer(
        base64.b64decode(shown["data"]), "<f2" if "16" in shown["dtype"] else "u1"
    )
    values = raw.reshape(shown["shape"]).astype(numpy.float64)
    if shown["dtype"] == "uint8":
        values = values / 255 * numpy.array(shown["scale"])[:, None]
    return values


# -- as the SDK reads it


def test_the_sdk_reads_each_token_and_its_trace_from_one_chunk(sdk):
    header, *chunks, last = streamed(sdk, {"layers": [1]})
    assert header.choices[0].delta.role == "assistant"
    assert header.trace["v"] == 1
    assert [chunk.choices[0].delta.content for chunk in chunks] == list("Hello!")
    assert [chunk.trace["token_id"] for chunk in chunks] == list(b"Hello!")
    assert [chunk.trace["step"] for chunk in chunks] == list(range(6))
    prompt = header.trace["prompt"]["token_ids"]
    assert [chunk.trace["position"] for chunk in chunks] == [len(prompt) + i for i in range(6)]
    assert last.choices[0].finish_reason == "stop"
    assert not hasattr(last, "trace")


def test_the_header_tells_of_prompt_model_and_units(sdk):
    header = streamed(sdk, {})[0].trace
    ids = header["prompt"]["token_ids"]
    assert header["prompt"]["tokens"][:3] == ["<|im_start|>", "u", "s"]
    assert len(header["prompt"]["tokens"]) == len(ids)
    [span] = header["prompt"]["spans"]
    assert (span["role"], bytes(ids[span["start"] : span["end"]])) == ("user", b"Hi")
    assert header["model"] == {"layers": 2, "heads": 4, "kv_heads": 2}
    assert header["units"]["entropy"] == "nats"
    assert header["verified"] is True


def test_a_whole_answer_has_the_same_trace(sdk):
    header, *chunks, _ = streamed(sdk, {"layers": [0, 1]})
    answer = sdk.chat.completions.create(
        model="fake", messages=MESSAGES, extra_body={"trace": {"layers": [0, 1]}}
    )
    trace = answer.choices[0].trace
    assert trace["header"] == header.trace
    assert trace["steps"] == [chunk.trace for chunk in chunks]
    assert answer.choices[0].message.content == "Hello!"


def test_completions_have_the_header_in_the_first_trace_of_each_choice(sdk):
    options = {"model": "fake", "prompt": ["Hi", "Ho!"], "extra_body": {"trace": {"topk": 1}}}
    with sdk.completions.create(stream=True, **options) as stream:
        chunks = [chunk for chunk in stream if hasattr(chunk, "trace")]
    first = {}
    for chunk in chunks:
        trace = chunk.trace
        assert trace["index"] == chunk.choices[0].index
        assert ("header" in trace) == (trace["step"] == 0)
        first.setdefault(trace["index"], trace)
    assert [bytes(first[i]["header"]["prompt"]["token_ids"]) for i in (0, 1)] == [b"Hi", b"Ho!"]
    assert first[0]["header"]["prompt"]["spans"] == []
    answer = sdk.completions.create(**options)
    assert [len(choice.trace["steps"]) for choice in answer.choices] == [6, 6]
    assert "header" not in answer.choices[0].trace["steps"][0]


def test_each_of_several_answers_is_traced(sdk):
    chunks = streamed(sdk, {}, n=2)
    headers = [chunk.trace for chunk in chunks if "prompt" in getattr(chunk, "trace", {})]
    assert [header["index"] for header in headers] == [0, 1]
    steps = [c.trace for c in chunks if "step" in getattr(c, "trace", {})]
    for index in (0, 1):
        assert [t["step"] for t in steps if t["index"] == index] == list(range(6))
    whole = sdk.chat.completions.create(
        model="fake", messages=MESSAGES, n=2, extra_body={"trace": {}}
    )
    assert [choice.trace["steps"][0]["index"] for choice in whole.choices] == [0, 1]


def test_usage_tells_what_the_traces_took(sdk):
    chunks = streamed(sdk, {"layers": [0]}, stream_options={"include_usage": True})
    sent = sum(
        len(json.dumps(c.trace, separators=(",", ":"))) for c in chunks if hasattr(c, "trace")
    )
    used = chunks[-1].usage.trace
    assert used["bytes"] == pytest.approx(sent, abs=200)
    assert used["ms"] > 0
    assert chunks[-1].usage.completion_tokens == 7


def test_refusals_reach_the_sdk_as_bad_requests(sdk):
    with pytest.raises(openai.BadRequestError) as caught:
        streamed(sdk, {"layers": [7]})
    assert caught.value.param == "trace.layers"
    assert caught.value.body["message"] == "trace.layers must be in [0, 1]"


# -- what a step shows


def first_step(served, **trace):
    served.engine.reply = say("Hello!")
    response = served.complete("Hi there", trace=trace, temperature=0)
    assert response.status_code == 200, response.get_json()
    return steps_of(response.get_json())[0]


def test_a_step_without_wishes_has_the_numbers_of_the_token(served):
    assert first_step(served) == {
        "v": 1,
        "index": 0,
        "step": 0,
        "position": 8,
        "token_id": 72,
        "logprob": -0.510826,
        "surprisal": 0.510826,
        "entropy": 1.25,
        "rank": 0,
        "sampled": {"prob": 1.0, "entropy": 0.0},
        "topk": [
            {"token_id": 72, "token": "H", "logprob": -0.510826},
            {"token_id": 73, "token": "I", "logprob": -1.20397},
            {"token_id": 74, "token": "J", "logprob": -1.89712},
            {"token_id": 75, "token": "K", "logprob": -2.59027},
            {"token_id": 76, "token": "L", "logprob": -3.28341},
        ],
    }


@pytest.mark.parametrize(("attn", "error"), [("f16", 5e-4), ("u8", 1 / 510)])
def test_attention_in_bytes(served, attn, error):
    [shown] = first_step(served, layers=[1], attn=attn)["attn"]
    assert (shown["layer"], shown["key_start"], shown["shape"]) == (1, 0, [HEADS, 8])
    assert (shown["order"], shown["encoding"]) == ("C", "base64")
    assert (shown["sink"], shown["state"]) == (None, "exact")
    numpy.testing.assert_allclose(unpack(shown), weights(1, HEADS, 8), atol=error)


@pytest.mark.parametrize(("attn", "error"), [("json", 5e-6), ("json64", 0)])
def test_attention_in_numbers(served, attn, error):
    shown = first_step(served, layers=[0, 1], attn=attn)["attn"]
    assert [row["layer"] for row in shown] == [0, 1]
    expected = weights(1, HEADS, 8).astype(numpy.float64)
    numpy.testing.assert_allclose(shown[1]["weights"], expected, rtol=0, atol=error)


def test_only_the_heaviest_keys(served):
    [shown] = first_step(served, layers=[0], attn="topk", attn_topk=3)["attn"]
    assert shown["shape"] == [HEADS, 8]
    assert shown["idx"] == [[7, 6, 5]] * HEADS
    for row, kept, rest in zip(weights(0, HEADS, 8), shown["w"], shown["rest"], strict=True):
        assert kept == pytest.approx(row[[7, 6, 5]], abs=1e-5)
        assert rest == pytest.approx(1 - row[5:].sum(), abs=1e-5)


@pytest.mark.parametrize(("heads", "count"), [([2, 0], 2), ("mean", 1), ("max", 1), (None, HEADS)])
def test_some_heads_or_one_for_all(served, heads, count):
    [shown] = first_step(served, layers=[0], heads=heads)["attn"]
    assert shown["shape"] == [count, 8]
    if heads == [2, 0]:
        numpy.testing.assert_allclose(unpack(shown), weights(0, HEADS, 8)[[2, 0]], atol=5e-4)


def test_lens_and_lengths(served):
    step = first_step(served, lens={"layers": "every:1", "topk": 2}, resid_norms=True)
    assert [reading["layer"] for reading in step["lens"]] == [0, 1]
    assert step["lens"][0] == {
        "layer": 0,
        "token_id": 73,
        "token": "I",
        "prob": 0.6,
        "topk": [
            {"token_id": 73, "token": "I", "prob": 0.6},
            {"token_id": 74, "token": "J", "prob": 0.3},
        ],
        "rank_of_sampled": 3,
        "prob_of_sampled": 0.01,
        "entropy": 2.0,
    }
    assert step["resid_norms"] == [35.25, 88.125]
    assert "attn" not in step


# -- each token has its own


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ends_the_answer_is_traced_when_asked(served, stream):
    served.engine.reply = say("ab")
    for specials, expected in ((False, [97, 98]), (True, [97, 98, 258])):
        response = served.chat(stream=stream, trace={"specials": specials})
        if stream:
            payloads = events(response).payloads
            shown = [p["trace"] for p in payloads if "step" in p.get("trace", {})]
        else:
            shown = steps_of(response.get_json())
        assert [step["token_id"] for step in shown] == expected


def test_a_token_whose_text_is_held_back_has_its_own_chunk(served):
    served.engine.reply = say("a☺b")
    payloads = events(served.chat(stream=True, trace={})).payloads
    shown = [
        (p["trace"]["token_id"], p["choices"][0]["delta"]["content"])
        for p in payloads
        if "step" in p.get("trace", {})
    ]
    assert shown == [(97, "a"), (0xE2, ""), (0x98, ""), (0xBA, "☺"), (98, "b")]


def test_tokens_of_a_stop_string_are_traced_and_not_said(served):
    served.engine.reply = say("one END two")
    body = served.chat(stop=" END", trace={}).get_json()
    assert body["choices"][0]["message"]["content"] == "one"
    assert bytes(step["token_id"] for step in steps_of(body)) == b"one END"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [{}, {"n": 2, "seed": 3}, {"stop": "plix", "max_tokens": 12}])
def test_text_and_ids_are_the_same_with_and_without_trace(served, route, stream, asked):
    def read(**fields):
        response = post(served, route, stream, return_token_ids=True, **asked, **fields)
        assert response.status_code == 200
        if not stream:
            return [
                (c.get("text", c.get("message")), c["token_ids"], c["finish_reason"])
                for c in response.get_json()["choices"]
            ]
        got = events(response)
        choices = [c for p in got.payloads for c in p["choices"]]
        return got.done, [
            (got.text(i), [t for c in choices if c["index"] == i for t in c["token_ids"]])
            if route == "complete"
            else got.text(i)
            for i in range(asked.get("n", 1))
        ]

    assert read() == read(trace={"layers": [0], "specials": True})


@pytest.mark.parametrize("trace", [None, ...])
def test_without_a_trace_nothing_is_noted_and_nothing_is_said_of_it(served, trace):
    fields = {} if trace is ... else {"trace": trace}
    for route in ROUTES:
        body = post(served, route, **fields).get_json()
        assert "trace" not in body["choices"][0]
        assert "trace" not in body["usage"]
        assert served.engine.observed[-1] == {}
        payloads = events(post(served, route, True, **fields)).payloads
        assert all("trace" not in payload for payload in payloads)


def test_of_best_of_the_kept_are_shown(served):
    body = served.complete("Hi", best_of=3, n=2, trace={}).get_json()
    assert [steps_of(body, i)[0]["index"] for i in (0, 1)] == [0, 1]


def test_scoring_a_prompt_has_no_steps(served):
    body = served.complete("Hi", echo=True, logprobs=0, max_tokens=0, trace={}).get_json()
    assert steps_of(body) == []
    assert bytes(body["choices"][0]["trace"]["header"]["prompt"]["token_ids"]) == b"Hi"


# -- what is refused


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("trace", "param", "message"),
    [
        ([], "trace", "'trace' must be an object"),
        ({"layers": 3}, "trace.layers", "'trace.layers' must be a list of integers, or \"all\""),
        (
            {"layers": ["0"]},
            "trace.layers",
            "'trace.layers' must be a list of integers, or \"all\"",
        ),
        (
            {"layers": [True]},
            "trace.layers",
            "'trace.layers' must be a list of integers, or \"all\"",
        ),
        ({"layers": [2]}, "trace.layers", "trace.layers must be in [0, 1]"),
        (
            {"heads": "min"},
            "trace.heads",
            '\'trace.heads\' must be a list of integers, or "mean" or "max"',
        ),
        ({"layers": [0], "heads": [4]}, "trace.heads", "trace.heads must be in [0, 3]"),
        ({"layers": [0], "heads": []}, "trace.heads", "'trace.heads' must not be empty"),
        (
            {"attn": "f32"},
            "trace.attn",
            "'trace.attn' must be one of 'f16', 'u8', 'topk', 'json', 'json64'",
        ),
        (
            {"attn_topk": 0},
            "trace.attn_topk",
            "'trace.attn_topk' must be an integer from 1 to 4 096",
        ),
        ({"topk": 21}, "trace.topk", "'trace.topk' must be an integer from 0 to 20"),
        ({"lens": {}}, "trace.lens.layers", "'trace.lens.layers' is required"),
        (
            {"lens": {"layers": "every:0"}},
            "trace.lens.layers",
            '\'trace.lens.layers\' must be a list of integers, "all" or "every:N"',
        ),
        ({"lens": {"layers": [2]}}, "trace.lens.layers", "trace.lens.layers must be in [-1, 1]"),
        (
            {"router": True},
            "trace.router",
            "model type fake has no router: it is no mixture of experts",
        ),
        ({"specials": 1}, "trace.specials", "'trace.specials' must be true or false"),
    ],
)
def test_a_wrong_wish_is_refused_by_its_name_before_the_first_byte(
    served, route, stream, trace, param, message
):
    response = post(served, route, stream, trace=trace)
    assert response.status_code == 400
    error = response.get_json()["error"]
    assert (error["param"], error["message"]) == (param, message)
    assert served.engine.submitted == []
    assert served.swapper.status().leases == 0


@pytest.mark.parametrize(
    ("trace", "param", "message"),
    [
        ({"layer": [0]}, "trace.layer", "'trace.layer' is unknown; did you mean 'layers'?"),
        ({"lens": {"layers": "all", "top_k": 2}}, "trace.lens.top_k", "did you mean 'topk'?"),
        ({"c" * 5000: 1}, f"trace.{'c' * 64}", "is unknown; there are: layers"),
        ({"colour": "blue"}, "trace.colour", "is unknown; there are: layers, heads, attn, "),
    ],
)
def test_a_field_that_is_not_there_is_refused_with_the_nearest_one(served, trace, param, message):
    response = served.chat(trace=trace)
    error = response.get_json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_null_is_no_wish(served):
    assert served.chat(trace={"layers": [], "heads": None}).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_that_is_too_large_is_refused(serve, route, stream):
    served = serve(trace_max_bytes_per_token=2000)
    fields = {"max_tokens": 100, "trace": {"layers": [0, 1], "attn": "json"}}
    response = post(served, route, stream, **fields)
    error = response.get_json()["error"]
    assert (response.status_code, error["param"]) == (400, "trace")
    assert error["message"].startswith("trace too large: 4 heads x ")
    assert "keys x 2 layers as json is about" in error["message"]
    assert error["message"].endswith('(max 2000 bytes); use attn "topk" or "u8", or fewer layers')


@pytest.mark.parametrize("attn", ["f16", "u8", "topk", "json", "json64"])
def test_no_trace_is_larger_than_was_foreseen(serve, attn):
    """The smallest limit that lets a request pass is not less than what it really sends."""
    lens = {"layers": "all", "topk": 20}
    trace = {"layers": [0, 1], "attn": attn, "topk": 20, "lens": lens, "resid_norms": True}
    asked, model = TraceOptions().load(trace), fake_model()

    def passes(most):
        settings = Settings(trace_max_bytes_per_token=most)
        with suppress(InvalidRequest):
            return trace_plan.plan(model, asked, settings, prompt_tokens=2, max_tokens=64)

    least = bisect.bisect_left(range(1 << 18), True, key=lambda most: passes(most) is not None)
    served = serve(trace_max_bytes_per_token=least)
    fields = {"max_tokens": 64, "ignore_eos": True}
    assert served.complete("Hi", trace=trace, **fields).status_code == 200
    steps = steps_of(served.complete("Hi", trace=trace, **fields).get_json())
    assert max(len(json.dumps(step, separators=(",", ":"))) for step in steps) <= least


@pytest.mark.parametrize("route", ROUTES)
def test_inspection_that_is_switched_off_loads_nothing(serve, route):
    served = serve(inspect_enabled=False)
    response = post(served, route, trace={})
    assert response.status_code == 403
    assert response.get_json()["error"] == {
        "message": "Inspection is disabled on this server",
        "type": "invalid_request_error",
        "param": None,
        "code": "inspect_disabled",
    }
    assert served.loader.calls == []
    assert post(served, route).status_code == 200


def test_a_model_without_attention_is_told_by_its_code(served):
    anatomy = fake_anatomy(model_type="mamba", attention=(), layers=0, traces_attention=False)
    served.loader.build = lambda spec: fake_model(spec, inspector=FakeInspector(anatomy))
    error = served.chat(trace={"layers": "all"}).get_json()["error"]
    assert error["code"] == "attention_unavailable"
    assert error["message"] == "model type mamba has no attention weights"
