"""Facts out of a text, as JSON that a schema describes.

    make run
    .venv/bin/python examples/structured_extraction.py "Ann, 42, lives in Oslo and plays chess."

Needs `pip install openai` and `pip install pydantic`. OPENAI_BASE_URL names another server, MODEL
another model.
"""

import os
import sys

import openai
import pydantic

MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")


class Person(pydantic.BaseModel):
    """Somebody in a text."""

    name: str
    age: int
    city: str
    hobbies: list[str]


def main(text: str) -> None:
    """Print what was found."""
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:5000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Give name, age, city and hobbies as JSON."},
            {"role": "user", "content": text},
        ],
        response_format=Person,
        max_tokens=300,
        temperature=0,
    )
    print(answer.choices[0].message.parsed)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "Ann, 42, lives in Oslo and plays chess.")
