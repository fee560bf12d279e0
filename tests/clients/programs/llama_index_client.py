# /// script
# dependencies = ["llama-index-core", "llama-index-llms-openai-like", "pytest"]
# ///
"""LlamaIndex: chat, streams, structured output, an agent."""

import asyncio
import os
from typing import Literal

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Verdict(BaseModel):
    """What to think of it."""

    verdict: Literal["good", "bad"]
    score: int


def model(url):
    return OpenAILike(
        model=os.environ["MODEL"],
        api_base=os.environ[url] + "/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        temperature=0,
    )


def test_chat_and_stream():
    said = model("SCRIPTED_URL").chat([ChatMessage(role="user", content="SAY Hello.")])
    assert said.message.content == "Hello."
    pieces = model("SCRIPTED_URL").stream_chat([ChatMessage(role="user", content="SAY Hello.")])
    assert "".join(piece.delta or "" for piece in pieces) == "Hello."


def test_output_is_structured():
    made = model("URL").structured_predict(Verdict, PromptTemplate("Is bread good?"))
    assert isinstance(made, Verdict)


def test_an_agent_calls_a_tool():
    called = []

    def get_weather(city: str) -> str:
        """Weather of a city."""
        called.append(city)
        return "sunny"

    async def ask():
        agent = FunctionAgent(
            tools=[FunctionTool.from_defaults(get_weather)], llm=model("SCRIPTED_URL")
        )
        return str(await agent.run('CALL get_weather {"city": "Brno"}\nSAY Sun.'))

    assert asyncio.run(ask()) == "Sun."
    assert called == ["Brno"]
