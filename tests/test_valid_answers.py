"""The promise of forms and tools on the default model, drawn wildly: nothing invalid in 500."""

from __future__ import annotations

import json
import re
from collections import Counter

import jsonschema
import pytest

from tests.api.test_tools import TOOLS, checked
from tests.test_end_to_end import DEFAULT, client, environment, url  # noqa: F401 - fixtures

ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 30},
        "city": {"enum": ["Paris", "Rome"]},
        "rooms": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 4},
        "owner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
    },
    "required": ["street", "city", "rooms", "owner"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": ADDRESS, "strict": True}}
DATE = r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]"
GRAMMAR = 'root ::= item ("," item)* "."\nitem ::= [a-z]{2,6}'
CASES = {
    "schema": {"response_format": FORM},
    "object": {"response_format": {"type": "json_object"}},
    "expression": {"extra_body": {"structured_outputs": {"regex": DATE}}},
    "choice": {"extra_body": {"structured_outputs": {"choice": ["yes", "no", "no way"]}}},
    "grammar": {"extra_body": {"grammar": GRAMMAR}},
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "auto": {"tools": TOOLS, "tool_choice": "auto"},
    "form or call": {"tools": TOOLS, "response_format": FORM},
}
ANSWERS, AT_ONCE, WILD = 500, 16, 1.5


def check(case: str, message) -> None:
    """Raise where an answer is not what ``case`` asks for."""
    calls = [call.model_dump() for call in message.tool_calls or ()]
    checked(calls)
    text = message.content
    match case:
        case "required":
            assert calls
        case "schema" | "form or call" if not calls:
            jsonschema.validate(json.loads(text), ADDRESS)
        case "object":
            assert isinstance(json.loads(text), dict)
        case "expression":
            assert re.fullmatch(DATE, text)
        case "choice":
            assert text in ("yes", "no", "no way")
        case "grammar":
            assert re.fullmatch(r"[a-z]{2,6}(,[a-z]{2,6})*\.", text)


@pytest.mark.slow  # some minutes
@pytest.mark.timeout(1800)
def test_of_500_answers_of_the_default_model_none_is_invalid(client):  # noqa: F811
    whole: Counter[str] = Counter()
    for turn in range(ANSWERS // AT_ONCE + 1):
        case, options = list(CASES.items())[turn % len(CASES)]
        answer = client.chat.completions.create(
            model=DEFAULT,
            messages=[{"role": "user", "content": "Where do I live, and what is the weather?"}],
            n=AT_ONCE,
            seed=turn,
            temperature=WILD,
            max_tokens=160,
            **options,
        )
        for choice in answer.choices:
            if choice.finish_reason != "length":
                whole[case] += 1
                check(case, choice.message)
    assert set(whole) == set(CASES)
    assert sum(whole.values()) > ANSWERS / 2
