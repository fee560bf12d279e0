# /// script
# dependencies = ["openai-agents", "pytest"]
# ///
"""OpenAI's Agents SDK: tools, handoffs, output types, over both APIs, streamed and not."""

import asyncio
import os
from typing import Literal

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

set_tracing_disabled(True)
CALLS = []


@function_tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    CALLS.append(city)
    return "sunny"


class Verdict(BaseModel):
    verdict: Literal["good", "bad"]
    score: int


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel])
def make_model(request):
    def make(url):
        client = openai.AsyncOpenAI(base_url=os.environ[url] + "/v1", api_key="none", max_retries=0)
        return request.param(model=os.environ["MODEL"], openai_client=client)

    CALLS.clear()
    return make


def run(agent, text, streamed):
    async def stream():
        result = Runner.run_streamed(agent, text)
        kinds = [event.type async for event in result.stream_events()]
        assert "raw_response_event" in kinds
        return result

    return asyncio.run(stream() if streamed else Runner.run(agent, text))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called(make_model, streamed):
    agent = Agent("a", instructions="Help.", model=make_model("SCRIPTED_URL"), tools=[get_weather])
    result = run(agent, 'CALL get_weather {"city": "Bern"}\nSAY It is sunny.', streamed)
    assert (CALLS, result.final_output) == (["Bern"], "It is sunny.")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_hands_over_to_another(make_model, streamed):
    model = make_model("SCRIPTED_URL")
    second = Agent("second", instructions="Help.", model=model, tools=[get_weather])
    first = Agent("first", instructions="Hand over.", model=model, handoffs=[second])
    text = 'CALL transfer_to_second {}\nCALL get_weather {"city": "Rome"}\nSAY Warm.'
    result = run(first, text, streamed)
    assert result.last_agent.name == "second"
    assert (CALLS, result.final_output) == (["Rome"], "Warm.")


@pytest.mark.parametrize("streamed", [False, True])
def test_output_has_its_type(make_model, streamed):
    agent = Agent(
        "a",
        model=make_model("URL"),
        output_type=Verdict,
        model_settings=ModelSettings(temperature=0),
    )
    assert isinstance(run(agent, "Is bread good?", streamed).final_output, Verdict)
