"""Calls that no grammar has held: they count only if they are right."""

from __future__ import annotations

import json

import pytest

from tests import tokenizers
from tests.serving.test_constraints import compiler_of
from tests.serving.tools.formats import FORMATS
from tests.serving.tools.test_calls import TOOLS, planned
from transformers_api.errors import ConstraintsUnavailable
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.tools.answer_plan import plan
from transformers_api.serving.tools.spec import CallArguments, CallStart, Content, ToolUse

RIGHT = {"city": "Köln", "unit": "c", "days": 3}


@pytest.fixture(scope="module")
def compiler():
    """Of a tokenizer whose tokens cannot be told as bytes: ids are one off."""
    tokenizer = tokenizers.byte_level()
    made = compiler_of(tokenizer)
    made._vocabulary = type("Shifted", (), {"token_bytes": lambda _, token: b"?"})()
    return made


def unheld(compiler, mode="auto"):
    working = compiler_of(tokenizers.byte_level())
    use = ToolUse(tools=TOOLS, mode=mode)
    return plan(compiler, working._vocabulary, style=FORMATS["tagged json"], use=use)


def written(*calls) -> str:
    lines = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "".join(f"\n<tool_call>\n{line}\n</tool_call>" for line in lines).lstrip("\n")


def parts_of(compiler, text, size):
    made, parts = unheld(compiler).parser(), []
    for at in range(0, len(text), size):
        parts += made.push(text[at : at + size])
    return [*parts, *made.finish()], made


@pytest.mark.parametrize("size", [1, 5, 999])
@pytest.mark.parametrize(
    "arguments",
    [
        RIGHT,
        dict(reversed(RIGHT.items())),  # any order
        RIGHT | {"hourly": True},
    ],
)
def test_right_calls_are_calls(compiler, arguments, size):
    text = "Sure. " + written(("get_weather", arguments))
    parts, made = parts_of(compiler, text, size)
    said = "".join(part.text for part in parts if isinstance(part, Content))
    names = [part.name for part in parts if isinstance(part, CallStart)]
    read = json.loads("".join(part.text for part in parts if isinstance(part, CallArguments)))
    assert (said, names, read, made.calls) == ("Sure.", ["get_weather"], arguments, 1)


@pytest.mark.parametrize("size", [1, 5, 999])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get_wether", RIGHT),
        ("get_weather", {}),
        ("get_weather", RIGHT | {"days": "3"}),
        ("get_weather", RIGHT | {"days": 15}),
        ("get_weather", RIGHT | {"unit": "k"}),
        ("get_weather", RIGHT | {"more": 1}),
        ("ping-host.v2", {"opts": {"tags": ["a", 2]}}),
        ("ping-host.v2", {"opts": {"tags": ["a", "b", "c", "d"]}}),
        ("get_weather", [1]),
    ],
)
def test_wrong_calls_are_content(compiler, name, arguments, size):
    for calls in ([(name, arguments)], [("now", {}), (name, arguments)]):
        text = "Sure. " + written(*calls)
        parts, made = parts_of(compiler, text, size)
        assert all(isinstance(part, Content) for part in parts)
        said = "".join(part.text for part in parts)
        assert said.split() == text.split()
        assert made.calls == 0


def test_a_call_that_is_cut_is_content(compiler):
    text = "Sure. " + written(("get_weather", RIGHT))
    for cut in range(text.rindex("}")):  # in its name, too
        parts, made = parts_of(compiler, text[:cut], 4)
        assert all(isinstance(part, Content) for part in parts)
        assert "".join(part.text for part in parts).split() == text[:cut].split()
        assert made.calls == 0


def test_calls_that_have_to_come_need_a_grammar(compiler):
    with pytest.raises(ConstraintsUnavailable):
        unheld(compiler, mode="required")


def test_an_answer_of_any_text_is_checked_and_one_of_json_is_held():
    working = compiler_of(tokenizers.byte_level())
    for kind, source, are_held in (
        ("regex", "(.|\n)*", False),
        ("lark", "start: /(.|\\n)*/", False),
        ("json_schema", "{}", True),
    ):
        form = ConstraintSpec(kind=kind, source=source, param="x")
        assert planned(working, form=form).are_held is are_held
