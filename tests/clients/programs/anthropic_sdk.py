# /// script
# dependencies = ["anthropic", "pytest"]
# ///
"""Anthropic's SDK: messages, streams, tools, its tool runner, parse, counts."""

import os
from typing import Literal

import anthropic
import pytest
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
HELLO = [{"role": "user", "content": "Say hello"}]


class Verdict(BaseModel):
    verdict: Literal["good", "bad"]
    score: int


@pytest.fixture
def client():
    return anthropic.Anthropic(base_url=os.environ["URL"], api_key="none", max_retries=0)


@pytest.fixture
def scripted():
    return anthropic.Anthropic(base_url=os.environ["SCRIPTED_URL"], api_key="none", max_retries=0)


def test_a_message(client):
    message = client.messages.create(model=MODEL, max_tokens=9, messages=HELLO, system="Be brief.")
    assert message.content[0].text
    assert message.usage.output_tokens > 0


def test_a_stream(client):
    with client.messages.stream(model=MODEL, max_tokens=9, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_is_streamed(client, choice):
    with client.messages.stream(
        model=MODEL,
        max_tokens=99,
        messages=HELLO,
        tools=[TOOL],
        tool_choice=choice | {"disable_parallel_tool_use": True},
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert final.stop_reason == "tool_use"
    assert set(final.content[-1].input) == {"city"}


def test_the_tool_runner(scripted):
    called = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: its name
        """
        called.append(city)
        return "sunny"

    runner = scripted.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=200,
        tools=[get_weather],
        messages=[{"role": "user", "content": 'CALL get_weather {"city": "Linz"}\nSAY Sun.'}],
    )
    assert runner.until_done().content[0].text == "Sun."
    assert called == ["Linz"]


def test_parse(client):
    message = client.messages.parse(
        model=MODEL, max_tokens=99, messages=HELLO, output_format=Verdict
    )
    assert isinstance(message.parsed_output, Verdict)


def test_tokens_are_counted_and_models_listed(client):
    assert client.messages.count_tokens(model=MODEL, messages=HELLO, tools=[TOOL]).input_tokens > 9
    assert MODEL in [model.id for model in client.models.list()]


def test_an_error_is_of_its_kind(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="none", max_tokens=9, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=MODEL, max_tokens=0, messages=HELLO)
