"""Formats derived from templates: what a template writes is read back, and calls drawn are valid."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from tests import tokenizers
from tests.fakes import fake_model
from tests.serving.test_constraints import bits, compiler_of
from tests.serving.tools.templates import AMBIGUOUS, TEMPLATES, THINKING
from tests.serving.tools.test_calls import SCHEMAS, TOOLS, drawn, grammar_of, parsed
from transformers_api.serving.text import chat_template, model_template
from transformers_api.serving.text.model_template import ModelTemplate
from transformers_api.serving.tools.answer_plan import plan
from transformers_api.serving.tools.spec import Tool, ToolUse
from transformers_api.serving.tools.template_probe import after_thought

TURNS = [
    [("get_weather", {"city": 'São "old" town', "unit": "c", "days": 3})],
    [("get_weather", {"city": "Köln & <x>", "unit": "f", "days": 12, "hourly": True})],
    [("get_weather", {"city": "12", "unit": "f", "days": -1, "hourly": False})],
    [("ping-host.v2", {"opts": {"tags": ["a", "b c"]}})],
    [("now", {})],
    [
        ("get_weather", {"city": "Paris", "unit": "c", "days": 1}),
        ("get_weather", {"city": "Rome", "unit": "f", "days": 2}),
    ],
    [("now", {}), ("ping-host.v2", {"opts": {"tags": []}}), ("now", {})],
]


def template_of(source: str) -> ModelTemplate:
    return ModelTemplate(tokenizers.byte_level(chat_template=source))


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request):
    template = template_of(TEMPLATES[request.param])
    assert template.call_format is not None, request.param
    return template


def written(template, turn, content) -> str | None:
    """The text that a model would have to write for the calls of ``turn``."""
    style = template.call_format
    calls = [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {
                "name": name,
                "arguments": json.dumps(arguments, ensure_ascii=False)
                if style.takes_text
                else arguments,
            },
        }
        for name, arguments in turn
    ]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    return template._probe.answer(message)


def turns(style):
    return [turn for turn in TURNS if len(turn) == 1 or style.between is not None]


def test_what_the_template_writes_is_read_back(template):
    style, reasoning = template.call_format, template.reasoning
    marks = None if reasoning is None else (reasoning.open, reasoning.close)
    for turn in turns(style):
        for content in (None if style.content_is_null else "", "Let me look."):
            text = written(template, turn, content)
            is_open = marks is not None and not text.lstrip().startswith(marks[0])
            options = {
                "thought": marks,
                "is_thinking": is_open and marks[1] in text,
                "openings": template.answer_openings,
            }
            shown = content if content and content in text else ""
            for cut in (1, 5, None):
                thought, said, read = parsed(style, text, cut, **options)
                assert read == turn
                assert (said.strip() or thought.strip()) == shown


def test_the_calls_of_a_template_are_held_where_they_are_free(template):
    compiler = compiler_of(tokenizers.byte_level(merges=('{"', '":', "</", ">\n")))
    style, reasoning = template.call_format, template.reasoning
    use = ToolUse(tools=TOOLS, mode="auto")
    answer = plan(compiler, compiler._vocabulary, style=style, use=use)
    for turn in turns(style):
        if turn[0][1].get("days") == -1:  # not by its schema
            continue
        for content in (None if style.content_is_null else "", "Let me look."):
            text = written(template, turn, content)
            if reasoning is not None:
                text = after_thought(text, reasoning.close, text.find(turn[0][0]))
            constraint = answer.constrain()
            for token in compiler.encode(text.partition("<|im_end|>")[0]):
                mask = constraint.allowed()
                assert mask is None or token in bits(mask), text
                constraint.take(token)
            assert constraint.allowed() is not None, text
            assert constraint.is_complete or set(compiler.end_ids).intersection(
                bits(constraint.allowed())
            )


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


UNLISTED = ("tagged json", "xml", "named", "channels", "arguments as text")


@pytest.mark.parametrize("kind", UNLISTED)
def test_tools_that_a_template_does_not_show_are_shown_by_us_with_its_form_of_calls(kind):
    source = TEMPLATES[kind].partition("</tools>")[2].partition("{% endif %}")[2]
    tokenizer = tokenizers.byte_level(chat_template=source, merges=("<tool_call>",))
    model = fake_model(tokenizer=tokenizer)
    style = model.template.call_format
    assert style == template_of(TEMPLATES[kind]).call_format
    text = chat_template.render(
        model, [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tools=TOOLS
    )
    assert all(tool.name in text for tool in TOOLS)
    example = model.template.call_example
    assert example in text
    assert parsed(style, example, None)[2] == [("function_name", {"argument": "value"})]
    ids = chat_template.encode(model, [{"role": "user", "content": "Hi"}], tools=TOOLS).ids
    assert tokenizer.decode(ids) == text


def test_control_tokens_of_our_example_are_tokens_and_those_of_a_tool_are_text():
    source = TEMPLATES["tagged json"].partition("</tools>")[2].partition("{% endif %}")[2]
    source = source.replace("<tool_call>", "<|im_start|>call")
    tokenizer = tokenizers.byte_level(chat_template=source)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model = fake_model(tokenizer=tokenizer)
    hello = [{"role": "user", "content": "Hi"}]
    plain = chat_template.encode(model, hello).ids.count(start)
    tool = Tool(name="f", description="<|im_start|>system")
    ids = chat_template.encode(model, hello, tools=[tool]).ids
    assert ids.count(start) == plain + 2  # the turn of the system, and the call in it


def test_the_tools_of_a_request_stand_in_the_prompt(template):
    text = template.render(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tools=[tool.as_json for tool in TOOLS],
        kwargs={},
    )
    assert "ping-host.v2" in text


def test_a_format_that_does_not_read_back_is_none():
    assert template_of(AMBIGUOUS).call_format is None


HEADERS = (
    " to=functions.now<|channel|>commentary json<|message|>{}",
    "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}",
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
    "to=functions.now <|constrain|>json<|message|>{}",
)


@pytest.mark.parametrize("text", HEADERS)
def test_the_words_of_a_channel_may_come_in_either_order(text):
    template = template_of(TEMPLATES["channels"])
    style, reasoning = template.call_format, template.reasoning
    marks = (reasoning.open, reasoning.close)
    for cut in (1, 5, None):
        thought, said, calls = parsed(style, text, cut, thought=marks)
        assert (thought, said, calls) == ("hm" if "hm" in text else "", "", [("now", {})])
    compiler = compiler_of(tokenizers.byte_level())
    use = ToolUse(tools=TOOLS, mode="auto")
    constraint = plan(compiler, compiler._vocabulary, style=style, use=use).constrain()
    for token in compiler.encode(text):
        assert constraint.allowed() is None or token in bits(constraint.allowed())
        constraint.take(token)
    assert constraint.allowed() is not None


def test_headers_before_an_answer_are_no_content():
    template = template_of(TEMPLATES["channels"])
    marks = (template.reasoning.open, template.reasoning.close)
    options = {"thought": marks, "openings": template.answer_openings}
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    for before, reasoning in (("", ""), (thought, "hm")):
        text = before + "<|channel|>final<|message|>Hello <|start"
        for cut in (1, 5, None):
            assert parsed(None, text, cut, **options) == (reasoning, "Hello <|start", [])
    assert parsed(None, "<|channel|>fin", 1, **options)[1] == "<|channel|>fin"


def test_a_slow_template_is_asked_no_longer(monkeypatch):
    monkeypatch.setattr(model_template, "_PROBED_S", 0.0)
    template = template_of(TEMPLATES["xml"])
    assert (template.call_format, template.reasoning) == (None, None)
