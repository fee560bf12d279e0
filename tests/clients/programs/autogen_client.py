# /// script
# dependencies = ["autogen-agentchat", "autogen-ext[openai]", "pytest"]
# ///
"""AutoGen: an assistant with a tool, and output of a type."""

import asyncio
import os

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel


class Score(BaseModel):
    score: int


def client(url):
    return OpenAIChatCompletionClient(
        model=os.environ["MODEL"],
        base_url=os.environ[url] + "/v1",
        api_key="none",
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": True,
            "structured_output": True,
            "family": "unknown",
        },
    )


def test_an_assistant_calls_a_tool():
    called = []

    async def get_weather(city: str) -> str:
        """Weather of a city."""
        called.append(city)
        return "sunny"

    async def ask():
        agent = AssistantAgent(
            "a", client("SCRIPTED_URL"), tools=[get_weather], reflect_on_tool_use=True
        )
        result = await agent.run(task='CALL get_weather {"city": "Gera"}\nSAY Sun.')
        return result.messages[-1].content

    assert asyncio.run(ask()) == "Sun."
    assert called == ["Gera"]


def test_output_has_its_type():
    async def ask():
        made = await client("URL").create(
            [UserMessage(content="Score?", source="user")], json_output=Score
        )
        return made.content

    Score.model_validate_json(asyncio.run(ask()))
