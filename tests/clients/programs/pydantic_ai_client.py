# /// script
# dependencies = ["pydantic-ai-slim[openai,anthropic]", "pytest"]
# ///
"""pydantic-ai: tools and its three modes of output, over three APIs."""

import asyncio
import os
from typing import Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

MODEL = os.environ["MODEL"]


class Verdict(BaseModel):
    verdict: Literal["good", "bad"]
    score: int


def chat(url):
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url + "/v1", api_key="none"))


def responses(url):
    return OpenAIResponsesModel(
        MODEL, provider=OpenAIProvider(base_url=url + "/v1", api_key="none")
    )


def messages(url):
    return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=url, api_key="none"))


ALL = [chat, responses, messages]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called(make, streamed):
    agent = Agent(make(os.environ["SCRIPTED_URL"]))
    called = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Weather of a city."""
        called.append(city)
        return "sunny"

    text = 'CALL get_weather {"city": "Graz"}\nSAY Sun.'

    async def stream():
        async with agent.run_stream(text) as result:
            return "".join([piece async for piece in result.stream_text(delta=True)])

    said = asyncio.run(stream()) if streamed else agent.run_sync(text).output
    assert (called, said) == (["Graz"], "Sun.")


MODES = [(make, mode) for make in ALL for mode in (ToolOutput, NativeOutput)]
MODES.remove((messages, NativeOutput))  # the client itself refuses it for models it does not know


@pytest.mark.parametrize(("make", "mode"), MODES)
def test_output_has_its_type(make, mode):
    agent = Agent(make(os.environ["URL"]), output_type=mode(Verdict), retries=0)
    output = agent.run_sync("Is bread good?", model_settings={"temperature": 0}).output
    assert isinstance(output, Verdict)


@pytest.mark.parametrize("make", ALL)
def test_output_is_asked_for_in_the_prompt(make):
    agent = Agent(make(os.environ["SCRIPTED_URL"]), output_type=PromptedOutput(Verdict), retries=0)
    said = agent.run_sync('SAY {"verdict": "good", "score": 3}').output
    assert said == Verdict(verdict="good", score=3)
