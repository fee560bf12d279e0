# /// script
# dependencies = ["ollama", "pytest"]
# ///
"""Ollama's SDK: chat, generate, embed, tools, format, what there is."""

import os
from typing import Literal

import ollama
import pytest
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
HELLO = [{"role": "user", "content": "Say hello"}]


class Verdict(BaseModel):
    verdict: Literal["good", "bad"]
    score: int


def get_weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


@pytest.fixture
def client():
    return ollama.Client(host=os.environ["URL"])


@pytest.fixture
def scripted():
    return ollama.Client(host=os.environ["SCRIPTED_URL"])


@pytest.mark.parametrize("stream", [False, True])
def test_chat_and_generate(client, stream):
    options = {"num_predict": 9, "temperature": 0}
    said = client.chat(MODEL, HELLO, options=options, stream=stream)
    parts = list(said) if stream else [said]
    assert "".join(part.message.content for part in parts)
    assert parts[-1].done
    said = client.generate(MODEL, "Say hello", options=options, stream=stream)
    assert "".join(part.response for part in (said if stream else [said]))


def test_format(client):
    said = client.chat(MODEL, HELLO, format=Verdict.model_json_schema(), options={"temperature": 0})
    Verdict.model_validate_json(said.message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_tools(scripted, stream):
    messages = [{"role": "user", "content": 'CALL get_weather {"city": "Wien"}\nSAY Sun.'}]
    said = scripted.chat(MODEL, messages, tools=[get_weather], stream=stream)
    parts = list(said) if stream else [said]
    (call,) = [call for part in parts for call in part.message.tool_calls or ()]
    assert call.function.arguments == {"city": "Wien"}
    messages += [
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_name": "get_weather", "content": get_weather("Wien")},
    ]
    last = scripted.chat(MODEL, messages, tools=[get_weather])
    assert last.message.content == "Sun."


def test_embed(client):
    assert len(client.embed(os.environ["EMBEDDING_MODEL"], ["one", "two"]).embeddings) == 2
    assert client.embeddings(os.environ["EMBEDDING_MODEL"], "one").embedding


def test_what_there_is(client):
    assert MODEL in [model.model for model in client.list().models]
    assert "completion" in client.show(MODEL).capabilities
    assert client.ps().models
    with pytest.raises(ollama.ResponseError) as missing:
        client.chat("none", HELLO)
    assert missing.value.status_code == 404
