"""Fields of vLLM and llama-server beyond OpenAI's: what they ask of the engine, and their answers."""

from __future__ import annotations

import pytest

from tests import tokenizers
from tests.api.conftest import events
from tests.api.test_bodies import error
from tests.fakes import FakeEngine, say
from transformers_api.engine.base import DryParams

IM_END = tokenizers.IM_END


def script(*pieces):
    ids = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else list(piece.encode())
    return FakeEngine(lambda *_: ids)


def choice(response):
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()["choices"][0]


# -- what an answer stopped at


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({}, "one, two", None),
        ({"stop": ", "}, "one", ", "),
        ({"stop": ["x", "tw"]}, "one, ", "tw"),
        ({"stop_token_ids": [ord("w")]}, "one, t", ord("w")),
        ({"max_tokens": 3}, "one", None),
        ({"stop": ", ", "include_stop_str_in_output": True}, "one, ", ", "),
        ({"stop": ["x", "tw"], "include_stop_str_in_output": True}, "one, tw", "tw"),
        ({"stop_token_ids": [ord("w")], "no_stop_trim": True}, "one, tw", ord("w")),
        ({"include_stop_str_in_output": True}, "one, two", None),
    ],
)
def test_an_answer_says_what_it_stopped_at(serve, route, fields, text, reason):
    served = serve(FakeEngine(say("one, two")))
    ask = getattr(served, route)
    answer = choice(ask(**fields))
    assert answer["stop_reason"] == reason
    assert answer.get("text", answer.get("message", {}).get("content")) == text
    stream = events(ask(stream=True, **fields))
    assert stream.text() == text
    last = stream.payloads[-1]["choices"][0]
    assert (last["stop_reason"], bool(last["finish_reason"])) == (reason, True)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 0}])
def test_a_stop_string_of_special_tokens_is_shown_where_that_is_asked_for(serve, fields):
    served = serve(script("a", IM_END, "b", IM_END, "\ncd"))
    fields |= {"stop": "b<|im_end|>\n", "include_stop_str_in_output": True}
    assert choice(served.complete(**fields))["text"] == "ab<|im_end|>\n"
    assert events(served.complete(stream=True, **fields)).text() == "ab<|im_end|>\n"


# -- log probabilities of the prompt


def test_prompt_logprobs_are_vllms(serve):
    served = serve(FakeEngine(say("x")))
    scores = choice(served.complete("abc", prompt_logprobs=2))["prompt_logprobs"]
    own = {"logprob": -0.5, "rank": None, "decoded_token": "b"}
    near = {"logprob": -1.5, "rank": 2, "decoded_token": "c"}
    assert scores[:2] == [None, {"98": own, "99": near}]
    assert len(scores) == 3
    assert list(choice(served.complete("abc", prompt_logprobs=0))["prompt_logprobs"][2]) == ["99"]
    body = served.chat("abc", prompt_logprobs=1).get_json()
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in body["choices"][0]
    assert "prompt_logprobs" not in served.chat("abc").get_json()


def test_prompt_logprobs_and_those_of_an_echo_keep_to_their_own_numbers(served):
    answer = choice(served.complete("abc", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=2))
    assert [len(top or {}) for top in answer["logprobs"]["top_logprobs"]] == [0, 1, 1, 1, 1]
    assert [len(top or {}) for top in answer["prompt_logprobs"]] == [0, 3, 3]
    answer = choice(served.complete("abc", echo=True, logprobs=3, prompt_logprobs=1))
    assert [len(top or {}) for top in answer["prompt_logprobs"]] == [0, 1, 1]
    assert served.params().prompt_logprobs == 3
    alone = choice(served.complete("abc", logprobs=1, prompt_logprobs=1, max_tokens=2))
    assert len(alone["logprobs"]["tokens"]) == 2
    scored = choice(served.complete("abc", prompt_logprobs=1, max_tokens=0))
    assert (scored["text"], len(scored["prompt_logprobs"])) == ("", 3)


def test_a_prompt_is_scored_once_for_all_its_answers(served):
    fields = {"n": 2, "best_of": 3, "max_tokens": 2, "prompt_logprobs": 1, "echo": True, "seed": 5}
    choices = served.complete(["ab", "cd"], **fields, logprobs=0).get_json()["choices"]
    firsts = [next(iter(choice["prompt_logprobs"][1])) for choice in choices]
    assert firsts == ["98", "98", "100", "100"]
    assert {len(choice["logprobs"]["tokens"]) for choice in choices} == {4}
    (submit,) = served.engine.submitted
    assert [s.params.prompt_logprobs is not None for s in submit] == [True, False, False] * 2
    served.complete("ab", n=2, echo=True, logprobs=0, max_tokens=0)
    assert all(s.params.prompt_logprobs == 0 for s in served.engine.submitted[-1])


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_prompt_logprobs_come_with_no_stream(served, route):
    body = error(getattr(served, route)(stream=True, prompt_logprobs=1))
    assert body["param"] == "prompt_logprobs"


# -- names of tokens


def test_tokens_are_named_by_their_ids_where_that_is_asked_for(serve):
    served = serve(FakeEngine(say("é")))
    fields = {"return_tokens_as_token_ids": True}
    scores = choice(served.complete(logprobs=1, **fields))["logprobs"]
    assert scores["tokens"] == ["token_id:195", "token_id:169"]
    assert list(scores["top_logprobs"][0]) == ["token_id:195"]
    content = choice(served.chat(logprobs=True, top_logprobs=1, **fields))["logprobs"]["content"]
    assert [(t["token"], t["bytes"]) for t in content] == [
        ("token_id:195", [195]),
        ("token_id:169", [169]),
    ]
    assert content[0]["top_logprobs"][0]["token"] == "token_id:195"
    stream = events(served.complete(stream=True, logprobs=0, **fields))
    names = [n for p in stream.payloads for n in (p["choices"][0]["logprobs"] or {})["tokens"]]
    assert names == ["token_id:195", "token_id:169"]


# -- usage


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_every_chunk_has_the_usage_so_far_where_that_is_asked_for(serve, route):
    served = serve(FakeEngine(say("abc")))
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = events(getattr(served, route)(stream=True, stream_options=options))
    counts = [payload["usage"]["completion_tokens"] for payload in stream.payloads]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert {1, 2, 3} <= set(counts)
    prompt = {payload["usage"]["prompt_tokens"] for payload in stream.payloads}
    assert len(prompt) == 1
    alone = events(getattr(served, route)(stream=True, stream_options={"include_usage": True}))
    assert [p["usage"] for p in alone.payloads[:-1]] == [None] * (len(alone.payloads) - 1)
    assert alone.payloads[-1]["usage"] == stream.payloads[-1]["usage"]


def test_usage_has_details_of_the_answer(served):
    assert served.chat().get_json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


# -- lengths


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_minus_one_is_all_that_the_context_leaves(serve, route, name):
    served = serve(FakeEngine(max_model_len=200))
    assert getattr(served, route)(**{name: -1}).status_code == 200
    request = served.engine.submitted[0][0]
    assert request.params.max_tokens == 200 - len(request.prompt_ids)
    for wrong in (-2, -(1 << 24)):
        assert error(getattr(served, route)(**{name: wrong}))["param"] == name


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "hij"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "hij"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 10}, "abcdefghij"),
        ({"truncate_prompt_tokens": 11}, "abcdefghij"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 5}, "fghij"),
        ({"truncate_prompt_tokens": -1, "max_tokens": -1}, "bcdefghij"),
        ({"truncate_prompt_tokens": -1}, "fghij"),
    ],
)
@pytest.mark.parametrize("ids", [False, True])
def test_a_prompt_is_cut_to_what_is_asked_for(serve, fields, kept, ids):
    served = serve(FakeEngine(max_model_len=10 if fields["truncate_prompt_tokens"] < 0 else 64))
    prompt = list(b"abcdefghij") if ids else "abcdefghij"
    answer = served.complete(prompt, echo=True, logprobs=0, **fields).get_json()
    assert bytes(served.engine.submitted[0][0].prompt_ids).decode() == kept
    assert answer["usage"]["prompt_tokens"] == len(kept)
    assert answer["choices"][0]["text"].startswith(kept)
    assert answer["choices"][0]["logprobs"]["text_offset"][: len(kept)] == list(range(len(kept)))


def test_a_conversation_is_cut_too(served):
    served.chat("abc", truncate_prompt_tokens=5)
    assert len(served.engine.submitted[0][0].prompt_ids) == 5


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": -2}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": "5"}),
        ("truncation_side", {"truncation_side": "left"}),
        ("truncation_side", {"truncate_prompt_tokens": 5, "truncation_side": "middle"}),
    ],
)
def test_what_cannot_be_cut_is_told(served, param, fields):
    assert error(served.complete(**fields))["param"] == param


def test_a_hundred_and_twenty_eight_answers_are_made(serve):
    served = serve(max_inflight=8, max_queue=128)
    answer = served.complete(n=128, seed=1, max_tokens=30).get_json()
    assert [c["index"] for c in answer["choices"]] == list(range(128))
    assert len({c["text"] for c in answer["choices"]}) > 100


# -- how tokens are chosen


def test_fields_of_local_samplers_reach_the_engine(served):
    fields = {"top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.2, "repeat_last_n": 64}
    assert served.chat(**fields, allowed_token_ids=[97, 98]).status_code == 200
    params = served.params()
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.allowed_token_ids == {97, 98}


@pytest.mark.parametrize("ids", [[], [259], [-1], [True], ["a"], 5])
def test_allowed_tokens_are_tokens_of_the_model(served, ids):
    body = error(served.complete(allowed_token_ids=ids))
    assert body["param"].startswith("allowed_token_ids")


def test_some_allowed_token_may_come_before_the_answer_may_end(served):
    body = error(served.complete(allowed_token_ids=[258], min_tokens=1))
    assert body["param"] == "allowed_token_ids"
    assert served.complete(allowed_token_ids=[258]).status_code == 200
    assert served.complete(allowed_token_ids=[258, 97], min_tokens=1).status_code == 200
    fields = {"allowed_token_ids": [258], "min_tokens": 1, "ignore_eos": True}
    assert served.complete(**fields).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"dry_multiplier": 0}, {"dry_base": 2.0}])
def test_without_a_multiplier_there_is_no_dry_penalty(served, fields):
    served.complete(**fields)
    assert served.params().dry is None


def test_a_dry_penalty_that_looks_nowhere_is_none(served):
    served.complete(dry_multiplier=1, dry_penalty_last_n=0)
    assert served.params().dry is None


def test_dry_penalties_have_llamas_defaults(served):
    served.complete(dry_multiplier=0.8)
    breakers = {token: frozenset({()}) for token in b'\n:"*'}
    assert served.params().dry == DryParams(multiplier=0.8, breakers=breakers)
    assert (served.params().dry.base, served.params().dry.allowed_length) == (1.75, 2)


def test_a_dry_breaker_of_many_tokens_has_a_head_and_tails(served):
    served.complete(dry_multiplier=1, dry_sequence_breakers=["abc", "b"])
    breakers = served.params().dry.breakers
    assert breakers == {97: frozenset({(98, 99)}), 98: frozenset({()})}


@pytest.mark.parametrize("value", [[], ["x"] * 17, [""], "x", [5], ["x" * 33]])
def test_dry_breakers_are_a_few_short_texts(served, value):
    body = error(served.complete(dry_multiplier=1, dry_sequence_breakers=value))
    assert body["param"].startswith("dry_sequence_breakers")
