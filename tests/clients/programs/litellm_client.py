# /// script
# dependencies = ["litellm", "pytest"]
# ///
"""LiteLLM's SDK: chat, streams, tools, formats, responses and messages."""

import json
import os

import litellm
import pytest
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
OPENAI = {"model": f"openai/{MODEL}", "api_key": "none", "max_retries": 0}
SCRIPT = [{"role": "user", "content": 'CALL get_weather {"city": "Lyon"}\nSAY Sun.'}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Score(BaseModel):
    score: int


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic", "ollama_chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_calls(provider, stream):
    base = os.environ["SCRIPTED_URL"] + ("/v1" if provider in ("openai", "hosted_vllm") else "")
    options = {"model": f"{provider}/{MODEL}", "api_base": base, "api_key": "none"}
    said = litellm.completion(**options, messages=SCRIPT, tools=[TOOL], stream=stream)
    if stream:
        said = litellm.stream_chunk_builder(list(said))
    message = said.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Lyon"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    last = litellm.completion(**options, messages=[*SCRIPT, message, result], tools=[TOOL])
    assert last.choices[0].message.content == "Sun."


def test_format():
    said = litellm.completion(
        **OPENAI,
        api_base=os.environ["URL"] + "/v1",
        messages=[{"role": "user", "content": "Score?"}],
        response_format=Score,
    )
    Score.model_validate_json(said.choices[0].message.content)


def test_responses():
    said = litellm.responses(
        model=f"openai/{MODEL}",
        api_key="none",
        api_base=os.environ["SCRIPTED_URL"] + "/v1",
        input="SAY Hello.",
    )
    assert said.output[0].content[0].text == "Hello."


def test_embedding():
    said = litellm.embedding(
        model=f"openai/{os.environ['EMBEDDING_MODEL']}",
        api_key="none",
        api_base=os.environ["URL"] + "/v1",
        input=["one", "two"],
        encoding_format="float",
    )
    assert len(said.data) == 2
