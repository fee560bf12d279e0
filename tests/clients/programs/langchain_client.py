# /// script
# dependencies = ["langchain", "langchain-openai", "langchain-anthropic", "langchain-ollama", "pytest"]
# ///
"""LangChain: create_agent and with_structured_output, over four integrations."""

import os
from typing import Literal

import pytest
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL = os.environ["MODEL"]


class Verdict(BaseModel):
    """What to think of it."""

    verdict: Literal["good", "bad"]
    score: int


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def chat(url):
    return ChatOpenAI(model=MODEL, base_url=url + "/v1", api_key="none", temperature=0)


def responses(url):
    return ChatOpenAI(
        model=MODEL, base_url=url + "/v1", api_key="none", temperature=0, use_responses_api=True
    )


def messages(url):
    return ChatAnthropic(model=MODEL, base_url=url, api_key="none", temperature=0)


def ollama(url):
    return ChatOllama(model=MODEL, base_url=url, temperature=0)


ALL = [chat, responses, messages, ollama]


@pytest.mark.parametrize("make", ALL)
def test_an_agent_calls_a_tool(make):
    agent = create_agent(make(os.environ["SCRIPTED_URL"]), tools=[get_weather])
    text = 'CALL get_weather {"city": "Ulm"}\nSAY Sunny it is.'
    turns = agent.invoke({"messages": [{"role": "user", "content": text}]})["messages"]
    assert [turn.type for turn in turns] == ["human", "ai", "tool", "ai"]
    assert turns[2].content == "sunny in Ulm"
    assert turns[3].text == "Sunny it is."


@pytest.mark.parametrize("make", ALL)
def test_an_agent_streams(make):
    agent = create_agent(make(os.environ["SCRIPTED_URL"]), tools=[get_weather])
    text = 'CALL get_weather {"city": "Ulm"}\nSAY Sunny it is.'
    pieces = [
        piece.text
        for piece, _about in agent.stream(
            {"messages": [{"role": "user", "content": text}]}, stream_mode="messages"
        )
        if piece.type in ("ai", "AIMessageChunk")
    ]
    assert "".join(pieces) == "Sunny it is."


METHODS = [
    (chat, "json_schema"),
    (chat, "function_calling"),
    (ollama, "json_schema"),
    (responses, "json_schema"),
    (responses, "function_calling"),
    (messages, "json_schema"),
    (messages, "function_calling"),
]


@pytest.mark.parametrize(("make", "method"), METHODS)
def test_output_is_structured(make, method):
    model = make(os.environ["URL"]).with_structured_output(Verdict, method=method)
    assert isinstance(model.invoke("Is bread good?"), Verdict)


def test_output_is_structured_by_a_call_that_nothing_demands():
    model = ollama(os.environ["SCRIPTED_URL"])
    parsed = model.with_structured_output(Verdict, method="function_calling").invoke(
        'CALL Verdict {"verdict": "bad", "score": 1}'
    )
    assert parsed == Verdict(verdict="bad", score=1)


@pytest.mark.parametrize("make", [chat, ollama])
def test_output_is_structured_by_json_mode(make):
    model = make(os.environ["SCRIPTED_URL"]).with_structured_output(Verdict, method="json_mode")
    said = model.invoke('As JSON please:\nSAY {"verdict": "good", "score": 3}')
    assert said == Verdict(verdict="good", score=3)


@pytest.mark.parametrize(
    "embeddings",
    [
        lambda url: OpenAIEmbeddings(
            model=os.environ["EMBEDDING_MODEL"],
            base_url=url + "/v1",
            api_key="none",
            check_embedding_ctx_length=False,
        ),
        lambda url: OllamaEmbeddings(model=os.environ["EMBEDDING_MODEL"], base_url=url),
    ],
)
def test_embeddings(embeddings):
    one, two = embeddings(os.environ["URL"]).embed_documents(["one", "two"])
    assert len(one) == len(two) > 1
