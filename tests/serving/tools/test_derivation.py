"""Formats derived from templates: what a template writes is read back, and calls drawn are valid."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from tests import tokenizers
from tests.serving.test_constraints import compiler_of
from tests.serving.tools.templates import TEMPLATES, THINKING
from tests.serving.tools.test_calls import SCHEMAS, TOOLS, drawn, grammar_of, parsed
from transformers_api.serving.text.model_template import ModelTemplate

TURNS = [
    [("get_weather", {"city": 'São "old" town', "unit": "c", "days": 3})],
    [("get_weather", {"city": "Köln & <x>", "unit": "f", "days": 12, "hourly": True})],
    [("ping-host.v2", {"opts": {"tags": ["a", "b c"]}})],
    [
        ("get_weather", {"city": "Paris", "unit": "c", "days": 1}),
        ("get_weather", {"city": "Rome", "unit": "f", "days": 2}),
    ],
]


def template_of(source: str) -> ModelTemplate:
    return ModelTemplate(tokenizers.byte_level(chat_template=source))


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request):
    template = template_of(TEMPLATES[request.param])
    assert template.call_format is not None, request.param
    return template


def test_what_the_template_writes_is_read_back(template):
    style = template.call_format
    reasoning = template.reasoning
    for turn in TURNS:
        if len(turn) > 1 and style.between is None:
            continue
        calls = [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": json.dumps(arguments) if style.takes_text else arguments,
                },
            }
            for name, arguments in turn
        ]
        content = None if style.content_is_null else ""
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        probe = template._probe
        text = probe.answer(message)
        marks = None if reasoning is None else (reasoning.open, reasoning.close)
        for cut in (1, 5, None):
            _, said, read = parsed(style, text, cut, thought=marks)
            assert read == turn
            assert not said.strip()


def test_calls_drawn_under_the_derived_grammar_are_valid(template):
    compiler = compiler_of(tokenizers.byte_level(merges=('{"', '":', "</", ">\n")))
    grammar = grammar_of(compiler, template.call_format)
    whole = 0
    for seed in range(6):
        text = drawn(compiler, grammar, random.Random(seed))
        if text is not None:
            _, _, calls = parsed(template.call_format, text)
            assert calls
            for name, arguments in calls:
                jsonschema.validate(arguments, SCHEMAS[name])
            whole += 1
    assert whole >= 3


@pytest.mark.parametrize("kind", THINKING)
def test_the_marks_of_a_thought_are_found(kind):
    reasoning = template_of(THINKING[kind]).reasoning
    assert (reasoning.open, reasoning.close) == ("<think>", "</think>")
    assert reasoning.has_switch == (kind in ("field", "switch"))


def test_templates_without_calls_or_thoughts_have_none():
    template = template_of(tokenizers.CHATML)
    assert template.call_format is None
    assert template.reasoning is None
    assert template.takes_system


def test_tools_that_no_template_shows_are_no_format():
    source = TEMPLATES["tagged json"].partition("</tools>")[2].partition("{% endif %}")[2]
    assert template_of(source).call_format is None


def test_the_tools_of_a_request_stand_in_the_prompt(template):
    text = template.render(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tools=[tool.as_json for tool in TOOLS],
        kwargs={},
    )
    assert "ping-host.v2" in text
