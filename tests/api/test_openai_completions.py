"""Legacy completions, whole and streamed, against the published types."""

import re

import pytest
from openai.types import Completion

from tests.api.conftest import events
from tests.fakes import FakeEngine, say
from transformers_api.api.openai.text_offsets import text_offsets


def whole(response) -> Completion:
    assert response.status_code == 200, response.get_data(as_text=True)
    return Completion.model_validate(response.get_json(), strict=True)


def test_an_answer_has_openais_shape(serve):
    served = serve(FakeEngine(say("Hello!")))
    answer = whole(served.complete("ab"))
    assert re.fullmatch(r"cmpl-[0-9a-f]{24}", answer.id)
    assert (answer.object, answer.model) == ("text_completion", "fake")
    assert answer.system_fingerprint == "fp_fake"
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "Hello!", "stop")
    assert choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 7)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_openais_defaults(served):
    served.complete()
    params = served.params()
    assert (params.max_tokens, params.temperature, params.top_p) == (16, 1.0, 1.0)
    assert params.stop_token_ids == frozenset()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        pytest.param("ab", [[97, 98]], id="text"),
        pytest.param(["ab", "c"], [[97, 98], [99]], id="texts"),
        pytest.param([97, 98], [[97, 98]], id="token ids"),
        pytest.param([[97, 98], [99]], [[97, 98], [99]], id="lists of token ids"),
    ],
)
def test_a_prompt_comes_in_four_forms(served, prompt, ids):
    answer = whole(served.complete(prompt))
    assert [list(request.prompt_ids) for request in served.engine.submitted[0]] == ids
    assert [choice.index for choice in answer.choices] == list(range(len(ids)))
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_choices_are_ordered_by_prompt_then_by_number(served):
    answer = whole(served.complete(["a", "b"], n=2, seed=1, echo=True, max_tokens=30))
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]
    assert len({choice.text for choice in answer.choices}) == 4


def test_the_best_of_many_are_sent(served):
    answer = whole(served.complete(n=1, best_of=3))
    assert len(answer.choices) == 1
    assert len(served.engine.submitted[0]) == 3


def test_a_stream_is_text_with_one_reason_per_choice(served):
    fields = {"n": 2, "seed": 3, "max_tokens": 40}
    answer = whole(served.complete(["a", "b"], **fields))
    options = {"include_usage": True}
    read = events(served.complete(["a", "b"], stream=True, stream_options=options, **fields))
    for payload in read.payloads:
        chunk = Completion.model_validate(
            {**payload, "choices": [_with_reason(c) for c in payload["choices"]]}, strict=True
        )
        assert chunk.object == "text_completion"
    assert [read.text(i) for i in range(4)] == [choice.text for choice in answer.choices]
    assert sorted(read.reasons()) == [(i, "stop") for i in range(4)]
    assert read.payloads[-1]["choices"] == []
    assert read.payloads[-1]["usage"] == answer.usage.model_dump(exclude_unset=True)
    assert all("finish_reason" in c for p in read.payloads for c in p["choices"])
    assert read.done


def _with_reason(choice):
    """The published type knows no null here, though the service sends it."""
    assert choice["finish_reason"] in (None, "stop", "length")
    return {**choice, "finish_reason": choice["finish_reason"] or "stop"}


def test_logprobs_have_the_legacy_shape(serve):
    served = serve(FakeEngine(say("xé!")))
    scores = whole(served.complete("ab", logprobs=2)).choices[0].logprobs
    assert scores.tokens == ["x", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert scores.token_logprobs == [-0.5] * 4
    assert scores.text_offset == [2, 3, 4, 4]  # counted from the start of the prompt
    assert scores.top_logprobs[0] == {"x": -0.5, "y": -1.5}


def test_logprobs_of_zero_have_the_chosen_token(serve):
    served = serve(FakeEngine(say("x")))
    scores = whole(served.complete(logprobs=0)).choices[0].logprobs
    assert scores.top_logprobs == [{"x": -0.5}]


def test_echo_repeats_the_prompt(serve):
    served = serve(FakeEngine(say(" there")))
    assert whole(served.complete("Hi", echo=True)).choices[0].text == "Hi there"
    assert whole(served.complete([72, 105], echo=True)).choices[0].text == "Hi there"
    read = events(served.complete(["Hi", "Ho"], echo=True, stream=True))
    assert [read.text(0), read.text(1)] == ["Hi there", "Ho there"]


def test_a_prompt_is_scored_without_generating(served):
    response = served.complete("Hé", echo=True, logprobs=1, max_tokens=0)
    assert response.status_code == 200
    answer = response.get_json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hé", "length")
    scores = choice["logprobs"]
    assert scores["tokens"] == ["H", "bytes:\\xc3", "bytes:\\xa9"]
    assert scores["token_logprobs"] == [None, -0.5, -0.5]
    assert scores["top_logprobs"][0] is None
    assert scores["text_offset"] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 0
    params = served.params()
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (0, 1, 1)


def test_scores_of_prompt_and_answer_are_one_list(serve):
    served = serve(FakeEngine(say("yz")))
    whole_scores = served.complete("Hi", echo=True, logprobs=0, max_tokens=1).get_json()
    scores = whole_scores["choices"][0]["logprobs"]
    assert scores["tokens"] == ["H", "i", "y"]
    assert scores["text_offset"] == [0, 1, 2]
    read = events(served.complete("Hi", echo=True, logprobs=0, max_tokens=1, stream=True))
    parts = [p["choices"][0]["logprobs"] for p in read.payloads]
    assert {k: [v for part in parts for v in part[k]] for k in scores} == scores


def test_echo_with_nothing_to_generate_needs_no_scores(served):
    (choice,) = served.complete("Hi", echo=True, max_tokens=0).get_json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("Hi", None)


def test_token_ids_are_added_on_demand(serve):
    served = serve(FakeEngine(say("Hi")))
    choices = served.complete(["a", "b"], return_token_ids=True).get_json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[97], [98]]
    assert choices[1]["token_ids"] == [*b"Hi", 258]
    read = events(served.complete(["a", "b"], return_token_ids=True, stream=True))
    second = [p["choices"][0] for p in read.payloads if p["choices"][0]["index"] == 1]
    assert second[0]["prompt_token_ids"] == [98]
    assert not any("prompt_token_ids" in choice for choice in second[1:])
    assert [i for choice in second for i in choice["token_ids"]] == [*b"Hi", 258]


def test_a_completion_only_model_completes(serve):
    from tests.fakes import fake_spec

    served = serve(specs=(fake_spec(chat="off"),))
    assert served.complete().status_code == 200


def test_offsets_pass_over_what_is_not_in_the_text():
    tokens = [b"<s>", b" Hello", b" ", b"\xe4\xb8", b"\x96", "界".encode(), b"</s>"]
    assert text_offsets("Hello 世界", tokens) == [0, 0, 5, 6, 7, 7, 8]


def test_offsets_go_on_where_a_tokenizer_has_changed_the_text():
    assert text_offsets("Ärger über alles", [b"arger", b" ueber", b" alles"]) == [0, 0, 10]
    assert text_offsets("a\u00a0b word", [b"a", b" ", b"b", b" word"]) == [0, 1, 1, 3]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    "raw",
    [
        "a 👍 b 👍 c".encode(),
        b"a \xf0\x9f b \xff\xff c",
        b"\xf0\x9f\x91",
        "世界 né".encode(),
    ],
    ids=["emojis", "broken bytes", "half a character", "others"],
)
def test_offsets_of_a_stream_are_those_of_the_whole(serve, raw, echo):
    served = serve(FakeEngine(lambda *_: list(raw)))
    options = {"logprobs": 0, "max_tokens": 100, "echo": echo}
    whole = served.complete("né: ", **options).get_json()["choices"][0]
    chunks = events(served.complete("né: ", stream=True, **options)).payloads
    streamed = [i for chunk in chunks for i in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert streamed == whole["logprobs"]["text_offset"]
    tokens = len("né: ".encode()) * echo + len(raw)
    assert len(streamed) == tokens
    assert streamed == sorted(streamed)
    assert streamed[-1] <= len(whole["text"]) + (0 if echo else 4)
