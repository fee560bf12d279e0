# /// script
# dependencies = ["guidance", "openai", "pytest"]
# ///
"""guidance over HTTP: generation and JSON through OpenAI's API."""

import os

from guidance import assistant, gen, json, user
from guidance.models import OpenAI
from pydantic import BaseModel


class Score(BaseModel):
    score: int


def model():
    return OpenAI(os.environ["MODEL"], api_key="none", base_url=os.environ["URL"] + "/v1")


def test_generation():
    said = model()
    with user():
        said += "Say hello."
    with assistant():
        said += gen("text", max_tokens=9)
    assert said["text"]


def test_json():
    said = model()
    with user():
        said += "Score?"
    with assistant():
        said += json("made", schema=Score)
    Score.model_validate_json(said["made"])
