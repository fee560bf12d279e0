"""Chat completions, whole and streamed, against the published types."""

import re

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.api.conftest import events
from tests.fakes import FakeEngine, fake_spec, fake_tokenizer, say


def whole(response) -> ChatCompletion:
    assert response.status_code == 200, response.get_data(as_text=True)
    return ChatCompletion.model_validate(response.get_json(), strict=True)


def streamed(response) -> list[ChatCompletionChunk]:
    read = events(response)
    assert read.done
    return [ChatCompletionChunk.model_validate(payload, strict=True) for payload in read.payloads]


def shown(prompt) -> str:
    return fake_tokenizer().decode(prompt)


def test_an_answer_has_openais_shape(serve):
    served = serve(FakeEngine(say("Hello!"), cached_tokens=3))
    answer = whole(served.chat())
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", answer.id)
    assert (answer.object, answer.model, answer.system_fingerprint) == (
        "chat.completion",
        "fake",
        "fp_fake",
    )
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello!")
    prompt_tokens = len(served.engine.submitted[0][0].prompt_ids)
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == 7  # six bytes and the end of the text
    assert answer.usage.total_tokens == prompt_tokens + 7
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_a_stream_is_role_then_text_then_reason_then_done(serve):
    served = serve(FakeEngine(say("Hé!")))
    chunks = streamed(served.chat(stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    choices = [chunk.choices[0] for chunk in chunks]
    assert (choices[0].delta.role, choices[0].delta.content) == ("assistant", "")
    assert all(choice.delta.role is None for choice in choices[1:])
    assert [choice.delta.content for choice in choices[1:-1]] == ["H", "é", "!"]
    assert [choice.finish_reason for choice in choices] == [None] * 4 + ["stop"]
    assert choices[-1].delta.content is None


def test_every_chunk_says_that_it_is_not_the_last(served):
    payloads = events(served.chat(stream=True)).payloads
    assert all("finish_reason" in payload["choices"][0] for payload in payloads)
    assert all("usage" not in payload for payload in payloads)


def test_streamed_and_whole_answers_are_equal(served):
    fields = {"n": 3, "seed": 7, "stop": ["no"], "stream_options": {"include_usage": True}}
    answer = whole(served.chat(n=3, seed=7, stop=["no"]))
    read = events(served.chat(stream=True, **fields))
    assert [choice.message.content for choice in answer.choices] == [read.text(i) for i in range(3)]
    assert sorted(read.reasons()) == [(i, "stop") for i in range(3)]
    assert read.payloads[-1]["choices"] == []
    assert read.payloads[-1]["usage"] == answer.usage.model_dump(exclude_unset=True)
    assert all(payload["usage"] is None for payload in read.payloads[:-1])
    assert read.done


def test_each_choice_begins_with_its_role(served):
    chunks = streamed(served.chat(stream=True, n=2))
    roles = [c.choices[0].index for c in chunks if c.choices[0].delta.role == "assistant"]
    assert roles == [0, 1]


def test_the_end_by_length_is_told(serve):
    served = serve(FakeEngine(say("Hello")))
    answer = whole(served.chat(max_tokens=2))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("He", "length")
    assert events(served.chat(max_tokens=2, stream=True)).reasons() == [(0, "length")]


def test_a_stop_string_ends_the_answer(serve):
    served = serve(FakeEngine(say("one two three")))
    answer = whole(served.chat(stop=" two"))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one", "stop")
    assert events(served.chat(stop=[" two"], stream=True)).text() == "one"


def test_logprobs_are_per_token(serve):
    served = serve(FakeEngine(say("é!")))
    answer = whole(served.chat(logprobs=True, top_logprobs=2))
    scores = answer.choices[0].logprobs.content
    assert [score.bytes for score in scores] == [[0xC3], [0xA9], [ord("!")]]
    assert [score.token for score in scores] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert [len(score.top_logprobs) for score in scores] == [2, 2, 2]
    chunks = streamed(served.chat(logprobs=True, top_logprobs=2, stream=True))
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [score for part in parts for score in part] == scores


def test_logprobs_without_top_have_the_chosen_tokens_only(served):
    answer = whole(served.chat(logprobs=True))
    assert {len(score.top_logprobs) for score in answer.choices[0].logprobs.content} == {0}


def test_an_infinite_logprob_is_sent_as_a_number():
    from transformers_api.api.openai import logprobs as openai_logprobs
    from transformers_api.serving.text.choice_text import TokenDetail

    detail = TokenDetail(1, "x", b"x", float("-inf"))
    (score,) = openai_logprobs.chat_logprobs([detail])["content"]
    assert score["logprob"] == -9999.0


def test_token_ids_are_added_on_demand(serve):
    served = serve(FakeEngine(say("Hi")))
    (choice,) = served.chat(return_token_ids=True).get_json()["choices"]
    assert choice["prompt_token_ids"] == list(served.engine.submitted[0][0].prompt_ids)
    assert choice["token_ids"] == [*b"Hi", 258]
    payloads = events(served.chat(return_token_ids=True, stream=True)).payloads
    choices = [payload["choices"][0] for payload in payloads]
    assert choices[0]["prompt_token_ids"] == choice["prompt_token_ids"]
    assert [i for c in choices for i in c.get("token_ids", [])] == choice["token_ids"]
    assert "token_ids" not in served.chat().get_json()["choices"][0]


def test_the_documented_defaults(served):
    served.chat()
    params = served.params()
    assert (params.max_tokens, params.temperature, params.top_p) == (512, 0.7, 0.9)
    assert (params.top_k, params.seed, params.logprobs) == (0, None, None)


def test_the_registry_sets_defaults_and_the_request_overrides_them(serve):
    generation = {"temperature": 0.1, "max_tokens": 5, "stop": "!", "top_k": 3, "seed": None}
    served = serve(FakeEngine(say("a!bcdefgh")), specs=(fake_spec(generation=generation),))
    assert whole(served.chat()).choices[0].message.content == "a"
    params = served.params()
    assert (params.temperature, params.max_tokens, params.top_k, params.top_p) == (0.1, 5, 3, 0.9)
    answer = whole(served.chat(temperature=0.5, max_tokens=4, stop=["d"], top_k=-1))
    assert answer.choices[0].message.content == "a!bc"
    params = served.params()
    assert (params.temperature, params.max_tokens, params.top_k) == (0.5, 4, 0)


def test_every_sampling_field_reaches_the_engine(served):
    fields = {
        "temperature": 0.3,
        "top_p": 0.4,
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.6,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "min_tokens": 2,
        "max_tokens": 9,
        "ignore_eos": True,
    }
    served.chat(**fields, seed=7, logit_bias={"65": 5, "66": -100}, stop_token_ids=[67])
    params = served.params()
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {65: 5.0, 66: -100.0}
    assert params.stop_token_ids == {67}  # the end of a turn is ignored like the end of the text
    served.chat()
    assert served.params().stop_token_ids == {257}


def test_max_completion_tokens_wins(served):
    served.chat(max_tokens=3, max_completion_tokens=4)
    assert served.params().max_tokens == 4


def test_roles_and_parts_reach_the_template(served):
    served.chat(
        messages=[
            {"role": "developer", "content": "D"},
            {"role": "user", "content": [{"type": "text", "text": "U"}]},
            {"role": "assistant", "content": None},
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "T", "tool_call_id": "call_1"},
        ]
    )
    text = shown(served.engine.submitted[0][0].prompt_ids)
    call = '<tool_call>\n{"name":"f","arguments":{}}\n</tool_call>'
    turns = [("system", "D"), ("user", "U"), ("assistant", ""), ("assistant", call), ("tool", "T")]
    expected = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    assert text == expected + "<|im_start|>assistant\n"


def test_a_final_message_is_continued(served):
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "It is"}]
    assert served.chat(messages=messages, continue_final_message=True).status_code == 200
    assert shown(served.engine.submitted[0][0].prompt_ids).endswith("assistant\nIt is")


def test_the_generation_prompt_can_be_left_out(served):
    assert served.chat(add_generation_prompt=False).status_code == 200
    assert shown(served.engine.submitted[0][0].prompt_ids).endswith("<|im_end|>\n")


def test_a_completion_only_model_says_so(serve):
    served = serve(specs=(fake_spec(chat="off"),))
    response = served.chat()
    assert response.status_code == 501
    assert response.get_json()["error"] == {
        "message": "Chat completions are currently disabled; please use /v1/completions instead.",
        "type": "not_implemented_error",
        "param": None,
        "code": "chat_completions_not_available",
    }


@pytest.mark.parametrize("name", ["owner/second", "two"])
def test_the_request_names_its_model(served, name):
    answer = whole(served.chat(model=name))
    assert answer.model == name
    assert len(served.engines["owner/second"].submitted) == 1
    assert served.swapper.status().model == "owner/second"


def test_an_unknown_model_is_404_and_evicts_nothing(served):
    served.chat()
    response = served.chat(model="nobody/nothing")
    assert response.status_code == 404
    assert response.get_json()["error"] == {
        "message": "Model 'nobody/nothing' not found",
        "type": "model_not_found",
        "param": "model",
        "code": "model_not_found",
    }
    assert served.swapper.status().model == "fake"
