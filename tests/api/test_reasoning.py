"""What a model thinks comes apart from what it answers."""

from __future__ import annotations

import json

import pytest

from tests import tokenizers
from tests.api.conftest import events
from tests.api.tiny_app import running
from tests.serving.tools.templates import TEMPLATES, THINKING

MESSAGES = [{"role": "user", "content": "Hi"}]
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": {"a": 1}}}}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = {
        name: tokenizers.byte_level(merges=("<think>", "</think>"), chat_template=source)
        for name, source in (
            ("opened", THINKING["prompt"]),
            ("switched", TEMPLATES["thinking and tagged json"]),
        )
    }
    with running(tmp_path_factory.mktemp("thinking"), made) as app:
        yield app.test_client()


def chat(client, **fields):
    body = {"messages": MESSAGES, "temperature": 1.0, "seed": 1, "max_tokens": 60, **fields}
    return client.post("/v1/chat/completions", json=body)


def first(response) -> dict:
    assert response.status_code == 200, response.json
    return response.json["choices"][0]


def test_a_budget_closes_the_thought_and_the_form_holds_after_it(client):
    response = chat(client, thinking_budget_tokens=7, response_format=FORM)
    message = first(response)["message"]
    assert json.loads(message["content"]) == {"a": 1}
    assert message["reasoning"] == message["reasoning_content"]
    details = response.json["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == 8  # and the mark, which is one token here


def test_a_stream_has_the_same_parts(client):
    fields = {"thinking_budget_tokens": 7, "response_format": FORM, "logprobs": True}
    whole = first(chat(client, **fields))
    message = whole["message"]
    streamed = events(chat(client, stream=True, **fields))
    pieces = [payload["choices"][0]["logprobs"] or {} for payload in streamed.payloads]
    scores = [score for piece in pieces for score in piece.get("content", ())]
    assert scores == whole["logprobs"]["content"]
    deltas = [payload["choices"][0]["delta"] for payload in streamed.payloads]
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert (thought, streamed.text()) == (message["reasoning_content"], message["content"])
    assert streamed.reasons() == [(0, "stop")]


@pytest.mark.parametrize(
    "name", ["thinking_token_budget", "max_thinking_tokens", "reasoning_budget"]
)
def test_the_names_of_other_servers_mean_the_same_budget(client, name):
    expected = first(chat(client, thinking_budget_tokens=3, response_format=FORM))
    assert first(chat(client, **{name: 3}, response_format=FORM)) == expected
    assert first(chat(client, reasoning={"max_tokens": 3}, response_format=FORM)) == expected


def test_without_a_budget_a_thought_may_take_the_whole_answer(client):
    choice = first(chat(client, max_tokens=10))
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"]


@pytest.mark.parametrize(
    "fields", [{"reasoning_effort": "none"}, {"reasoning": {"enabled": False}}]
)
def test_no_effort_closes_the_thought_at_once(client, fields):
    message = first(chat(client, response_format=FORM, **fields))["message"]
    assert "reasoning_content" not in message
    assert json.loads(message["content"]) == {"a": 1}


def test_no_effort_uses_the_switch_of_a_template(client):
    fields = {"model": "switched", "max_tokens": 1, "return_token_ids": True}
    on, off = (
        len(first_ids(chat(client, reasoning_effort=effort, **fields)))
        for effort in ("low", "none")
    )
    assert off > on


def first_ids(response) -> list[int]:
    return first(response)["prompt_token_ids"]


def test_what_was_thought_may_be_left_out_or_left_in_the_text(client):
    fields = {"thinking_budget_tokens": 4, "response_format": FORM}
    thought = first(chat(client, **fields))["message"]["reasoning_content"]
    for left_out in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        assert set(first(chat(client, **fields, **left_out))["message"]) == {
            "role",
            "content",
            "refusal",
        }
    content = first(chat(client, reasoning_format="none", **fields))["message"]["content"]
    assert content.startswith(thought + "</think>{")


def test_a_model_that_opens_its_thought_itself_may_think_or_answer(client):
    tokens = json.dumps({"a": 1})
    fields = {"model": "switched", "response_format": FORM, "thinking_budget_tokens": 3}
    for seed in range(6):
        message = first(chat(client, seed=seed, **fields))["message"]
        assert json.loads(message["content"]) == json.loads(tokens)
    bias = {"259": 100}  # <think>
    message = first(chat(client, logit_bias=bias, **fields))["message"]
    assert message["reasoning_content"]


@pytest.mark.parametrize("model", ["opened", "switched"])
def test_an_answer_that_owes_a_form_does_not_end_in_its_thought(client, model):
    end = {"257": 4}  # the end of an answer, more likely than the mark of a thought's end
    for seed in range(6):
        fields = {"model": model, "seed": seed, "logit_bias": end, "max_tokens": 80}
        choice = first(chat(client, response_format=FORM, **fields))
        content = choice["message"]["content"]
        assert choice["finish_reason"] == "length" or json.loads(content) == {"a": 1}


def test_required_calls_come_after_the_thought(client):
    tool = {"type": "function", "function": {"name": "now"}}
    fields = {"model": "switched", "tools": [tool], "tool_choice": "required", "max_tokens": 900}
    fields |= {"parallel_tool_calls": False, "thinking_budget_tokens": 5}
    message = first(chat(client, **fields))["message"]
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


def test_what_was_thought_earlier_reaches_the_template(client):
    history = [
        *MESSAGES,
        {"role": "assistant", "content": "Yes.", "reasoning_content": "because of reasons"},
        *MESSAGES,
    ]
    fields = {"model": "switched", "messages": history, "max_tokens": 1, "return_token_ids": True}
    ids = first_ids(chat(client, **fields))
    assert b"because of reasons" in bytes(token for token in ids if token < 256)
