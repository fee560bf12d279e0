# /// script
# dependencies = ["instructor", "anthropic", "pytest"]
# ///
"""Instructor: the modes for OpenAI's and Anthropic's APIs."""

import os
from collections.abc import Iterable
from typing import Literal

import anthropic
import instructor
import openai
import pytest
from instructor import Mode
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
ASK = [{"role": "user", "content": "Is bread good?"}]


class Verdict(BaseModel):
    """What to think of it."""

    verdict: Literal["good", "bad"]
    score: int


CHAT = (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA)


def sdk(url):
    return openai.OpenAI(base_url=os.environ[url] + "/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("mode", CHAT)
def test_chat(mode):
    client = instructor.from_openai(sdk("URL"), mode=mode)
    made = client.chat.completions.create(
        model=MODEL, messages=ASK, response_model=Verdict, max_retries=0, temperature=0
    )
    assert isinstance(made, Verdict)


@pytest.mark.parametrize("mode", [Mode.JSON, Mode.MD_JSON])
def test_modes_that_ask_in_the_prompt(mode):
    client = instructor.from_openai(sdk("SCRIPTED_URL"), mode=mode)
    made = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": 'SAY {"verdict": "bad", "score": 2}'}],
        response_model=Verdict,
        max_retries=0,
    )
    assert (made.verdict, made.score) == ("bad", 2)


def test_parts_are_streamed():
    client = instructor.from_openai(sdk("URL"), mode=Mode.TOOLS)
    parts = list(client.create_partial(model=MODEL, messages=ASK, response_model=Verdict))
    assert isinstance(parts[-1].score, int)


def test_several_calls():
    client = instructor.from_openai(sdk("SCRIPTED_URL"), mode=Mode.PARALLEL_TOOLS)
    made = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": 'CALL Verdict {"verdict": "bad", "score": 2}'}],
        response_model=Iterable[Verdict],
    )
    assert [(each.verdict, each.score) for each in made] == [("bad", 2)]


def test_responses():
    client = instructor.from_openai(sdk("URL"), mode=Mode.RESPONSES_TOOLS)
    made = client.responses.create(
        model=MODEL, input="Is bread good?", response_model=Verdict, max_retries=0, temperature=0
    )
    assert isinstance(made, Verdict)


def test_messages():
    client = instructor.from_anthropic(
        anthropic.Anthropic(base_url=os.environ["URL"], api_key="none", max_retries=0),
        mode=Mode.ANTHROPIC_TOOLS,
    )
    made = client.messages.create(
        model=MODEL, messages=ASK, response_model=Verdict, max_tokens=99, max_retries=0
    )
    assert isinstance(made, Verdict)
