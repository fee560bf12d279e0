# /// script
# dependencies = ["outlines[openai]", "pytest"]
# ///
"""outlines over HTTP: through OpenAI's API and vLLM's fields."""

import os
from typing import Literal

import openai
import outlines
from outlines.types import JsonSchema, Regex
from pydantic import BaseModel

MODEL = os.environ["MODEL"]


class Verdict(BaseModel):
    verdict: Literal["good", "bad"]
    score: int


def sdk():
    return openai.OpenAI(base_url=os.environ["URL"] + "/v1", api_key="none", max_retries=0)


def test_openai():
    model = outlines.from_openai(sdk(), MODEL)
    Verdict.model_validate_json(model("Is bread good?", Verdict, temperature=0))


def test_vllm():
    model = outlines.from_vllm(sdk(), MODEL)
    Verdict.model_validate_json(model("Is bread good?", Verdict, temperature=0))
    assert model("A digit?", Regex("[0-9]{3}")).isdigit()
    assert model("Good?", Literal["good", "bad"]) in ("good", "bad")
    schema = JsonSchema({"type": "object", "properties": {}, "additionalProperties": False})
    assert model("Empty?", schema).strip() == "{}"


def test_sglang():
    model = outlines.from_sglang(sdk(), MODEL)
    Verdict.model_validate_json(model("Is bread good?", Verdict, temperature=0))
    assert model("A digit?", Regex("[0-9]{3}")).isdigit()
