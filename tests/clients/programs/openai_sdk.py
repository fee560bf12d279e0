# /// script
# dependencies = ["openai", "pytest"]
# ///
"""OpenAI's SDK for Python: parse, the stream helpers, responses, tools."""

import json
import os
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
FLAT = {"type": "function", **TOOL["function"]}


class City(BaseModel):
    name: str = Field(max_length=12)
    size: Literal["small", "large"]
    rank: int = Field(ge=0, le=99)


@pytest.fixture
def client():
    return openai.OpenAI(base_url=os.environ["URL"] + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def scripted():
    return openai.OpenAI(base_url=os.environ["SCRIPTED_URL"] + "/v1", api_key="none", max_retries=0)


def test_an_answer_is_parsed(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Describe Paris"}], response_format=City
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_a_streamed_answer_is_parsed(client):
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "Describe Paris"}], response_format=City
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, City)


def test_calls_are_streamed(client):
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather of Paris?"}],
        tools=[TOOL],
        tool_choice="required",
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    (call, *_) = final.choices[0].message.tool_calls
    assert set(call.function.parsed_arguments) == {"city"}


def test_calls_have_results(scripted):
    messages = [
        {"role": "user", "content": 'CALL get_weather {"city": "Köln"}\nSAY It is sunny.'},
    ]
    first = scripted.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    messages += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    last = scripted.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    assert last.choices[0].message.content == "It is sunny."


def test_responses_are_parsed(client):
    answer = client.responses.parse(model=MODEL, input="Describe Paris", text_format=City)
    assert isinstance(answer.output_parsed, City)


def test_streamed_responses_are_parsed(client):
    with client.responses.stream(model=MODEL, input="Describe Paris", text_format=City) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert isinstance(final.output_parsed, City)


def test_responses_call_and_go_on(scripted):
    text = 'CALL get_weather {"city": "Oslo"}\nSAY It rains.'
    first = scripted.responses.create(model=MODEL, input=text, tools=[FLAT])
    (call,) = first.output
    last = scripted.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        tools=[FLAT],
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
    )
    assert last.output_text == "It rains."
    assert scripted.responses.retrieve(last.id).output_text == "It rains."


def test_embeddings(client):
    answer = client.embeddings.create(model=os.environ["EMBEDDING_MODEL"], input=["a", "b"])
    assert len(answer.data) == 2
    assert answer.data[0].embedding != answer.data[1].embedding
