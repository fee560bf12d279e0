# /// script
# dependencies = ["haystack-ai", "pytest"]
# ///
"""Haystack: an agent with a tool, and a format."""

import os

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from pydantic import BaseModel


class Score(BaseModel):
    score: int


def generator(url, **options):
    return OpenAIChatGenerator(
        model=os.environ["MODEL"],
        api_base_url=os.environ[url] + "/v1",
        api_key=Secret.from_token("none"),
        generation_kwargs=options,
    )


def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def test_an_agent_calls_a_tool():
    agent = Agent(
        chat_generator=generator("SCRIPTED_URL"), tools=[create_tool_from_function(get_weather)]
    )
    text = 'CALL get_weather {"city": "Nice"}\nSAY Sun.'
    turns = agent.run(messages=[ChatMessage.from_user(text)])["messages"]
    assert [turn.role.value for turn in turns][-3:] == ["assistant", "tool", "assistant"]
    assert turns[-2].tool_call_result.result == "sunny in Nice"
    assert turns[-1].text == "Sun."


def test_format():
    made = generator("URL", response_format=Score, temperature=0)
    (said,) = made.run([ChatMessage.from_user("Score?")])["replies"]
    Score.model_validate_json(said.text)
