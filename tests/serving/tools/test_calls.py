"""Calls of every format: drawn at random under the grammar, read back, cut at every place."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from tests import tokenizers
from tests.serving.test_constraints import bits, compiler_of
from tests.serving.tools.formats import FORMATS
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.tools.answer_plan import plan
from transformers_api.serving.tools.call_grammar import CallGrammar
from transformers_api.serving.tools.call_parser import AnswerParser
from transformers_api.serving.tools.reasoning_style import ReasoningStyle
from transformers_api.serving.tools.spec import (
    CallArguments,
    CallStart,
    Content,
    Reasoning,
    Tool,
    ToolUse,
)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "hourly": {"type": "boolean"},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
PING = {
    "type": "object",
    "properties": {
        "opts": {
            "type": "object",
            "properties": {
                "tags": {
                    "type": "array",
                    "items": {"type": "string", "maxLength": 5},
                    "maxItems": 3,
                }
            },
            "required": ["tags"],
            "additionalProperties": False,
        }
    },
    "required": ["opts"],
    "additionalProperties": False,
}
TOOLS = (
    Tool(name="get_weather", description="d", parameters=WEATHER),
    Tool(name="ping-host.v2", parameters=PING),
    Tool(name="now"),
)
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
ALL = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(scope="module")
def compiler():
    return compiler_of(tokenizers.byte_level(merges=('{"', '":', "name", "</", ">\n", "tool")))


def grammar_of(compiler, style, *, most=True, lead=None):
    rules = CallGrammar(style, TOOLS, {}, parallel=most)
    source = rules.source(leads=[style.lead if lead is None else lead])
    return compiler.compile(ConstraintSpec(kind="rules", source=source, param="tools"))


def drawn(compiler, grammar, rng, most=1500) -> str | None:
    constraint, written = grammar.start(), b""
    for _ in range(most):
        token = rng.choice(bits(constraint.allowed()))
        if token in compiler.end_ids:
            return written.decode()
        written += compiler._vocabulary.token_bytes(token)
        constraint.take(token)
        if constraint.is_complete:
            return written.decode()
    return None


def read(parts) -> tuple[str, str, list[tuple[str, object]]]:
    """(reasoning, content, calls)."""
    names = [part.name for part in parts if isinstance(part, CallStart)]
    written = ["".join(p.text for p in parts if isinstance(p, CallArguments) and p.index == i)
               for i in range(len(names))]  # fmt: skip
    return (
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "".join(part.text for part in parts if isinstance(part, Content)),
        [(name, json.loads(text)) for name, text in zip(names, written, strict=True)],
    )


def parsed(style, text, cut=None, **options):
    parser, parts = AnswerParser(style, SCHEMAS, **options), []
    for piece in pieces(text, cut):
        parts += parser.push(piece)
    return read(parts + parser.finish())


def pieces(text, cut):
    rng = random.Random(1)
    at = 0
    while at < len(text):
        size = len(text) if cut is None else rng.randint(1, 9) if cut == "random" else cut
        yield text[at : at + size]
        at += size


NOTES = (
    {"type": "string"},
    {"type": "string", "minLength": 3, "maxLength": 40},
    {"type": "string", "pattern": "^A </b"},
    {"type": "string", "pattern": "go"},
)


@pytest.mark.parametrize("schema", NOTES, ids=str)
@ALL
def test_texts_in_calls_end_where_the_model_ends_them(compiler, name, schema):
    style = FORMATS[name]
    if style.core != "tagged":
        return
    properties = {"note": schema, "more": schema}
    tool = Tool(name="log", parameters={"properties": properties, "required": ["note", "more"]})
    source = CallGrammar(style, [tool], {}).source(leads=[style.lead])
    grammar = compiler.compile(ConstraintSpec(kind="rules", source=source, param="tools"))
    note, (before, after) = "A </b <par >go", style.quotes
    text = f"{style.lead}log{style.open}note{style.kv}{before}{note}{after}{style.sep}"
    text += f"more{style.kv}{before}{note}{after}{style.close}{style.tail}"
    constraint = grammar.start()
    for token in compiler.encode(text):
        assert token in bits(constraint.allowed()), text
        constraint.take(token)
    assert constraint.is_complete or set(bits(constraint.allowed())) & set(compiler.end_ids)
    schemas = {"log": tool.parameters}
    parser = AnswerParser(style, schemas)
    _, _, calls = read(parser.push(text) + parser.finish())
    assert calls == [("log", {"note": note, "more": note})]


@ALL
def test_random_calls_are_valid_and_read_back_however_they_are_cut(compiler, name):
    style = FORMATS[name]
    grammar = grammar_of(compiler, style)
    read_back = several = 0
    for seed in range(12):
        text = drawn(compiler, grammar, random.Random(seed))
        if text is None:
            continue
        whole = parsed(style, text)
        reasoning, content, calls = whole
        assert calls, text
        assert not reasoning + content, text
        for tool, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[tool])
        for cut in (1, 3, 7, "random"):
            assert parsed(style, text, cut) == whole, text
        read_back += 1
        several += len(calls) > 1
    assert read_back >= 6
    assert style.between is None or several


@ALL
def test_text_before_calls_is_content(name):
    style = FORMATS[name]
    if not style.lead.strip():
        return
    lead = style.lead if style.lead_after_content is None else style.lead_after_content
    text = f"Let me look.\n{lead or style.lead}" + example(style)
    for cut in (1, 4, None):
        _, content, calls = parsed(style, text, cut)
        assert content == "Let me look."
        assert [tool for tool, _ in calls] == ["now"]


def example(style) -> str:
    """A call of ``now``, without arguments."""
    match style.core:
        case "json":
            arguments = "{}" if not style.arguments_are_text else json.dumps("{}")
            if not style.name_key:
                return '{"now": {}}' + style.tail
            return (
                f'{{"{style.name_key}": "now", "{style.arguments_key}": {arguments}}}' + style.tail
            )
        case "named":
            mid = style.mid.replace("\0name\0", "now").replace("\0id\0", "abc123xyz")
            return f"now{mid}{{}}{style.tail}"
    return f"now{style.empty}{style.tail}"


@ALL
def test_an_answer_without_calls_is_content_to_the_letter(name):
    style = FORMATS[name]
    for text in ("Hello there.\n\n", "a < b, {x}: [1]", "", "  two\n", "<tool", "f(x) = {"):
        for cut in (1, None):
            _, content, calls = parsed(style, text, cut)
            assert (content, calls) == (text, [])


def test_what_looks_like_a_call_and_is_none_stays_text():
    style = FORMATS["tagged json"]
    text = "Use <tool_call> tags, as in <tool_call>\n(nothing)"
    assert parsed(style, text, 1) == ("", text, [])


BROKEN = (
    '{"name": nan,',
    '{"name": "f", "name": "g",',
    '{"name": "\\ud800",',
    '{"name": \udc00"x"',
)


@pytest.mark.parametrize("name", [name for name in FORMATS if "json" in name])
@pytest.mark.parametrize("core", BROKEN)
def test_calls_that_are_no_json_are_read_as_far_as_they_can_be(name, core):
    style = FORMATS[name]
    text = f'{style.lead}{core} "arguments": {{"a": 1}}}}{style.tail}'
    readings = []
    for cut in (None, 1):
        parser, parts = AnswerParser(style, SCHEMAS), []
        for piece in pieces(text, cut):
            parts += parser.push(piece)
        parts += parser.finish()
        names = [part.name for part in parts if isinstance(part, CallStart)]
        readings.append((names, "".join(p.text for p in parts if isinstance(p, CallArguments))))
    assert readings[0] == readings[1]
    assert len(readings[0][0]) <= 1
    assert "".join(readings[0][0]).isascii()


@pytest.mark.parametrize("text", [']{"name": 5}', 'So: {"name": "f", "parameters": {}}'])
@pytest.mark.parametrize("cut", [None, 1, 5])
def test_a_bare_call_behind_other_text_is_text_however_it_is_cut(text, cut):
    assert parsed(FORMATS["bare json"], text, cut) == ("", text, [])


def test_a_call_that_is_cut_off_has_what_came():
    parser = AnswerParser(FORMATS["tagged json"], SCHEMAS)
    parts = parser.push('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa')
    parts += parser.finish()
    assert [part.text for part in parts if isinstance(part, CallArguments)] == ['{"city": "Pa']


def test_arguments_stream_while_they_are_written():
    parser = AnswerParser(FORMATS["tagged json"], SCHEMAS)
    parser.push('<tool_call>\n{"name": "now", "arguments": ')
    assert parser.push('{"a": "b')[0].text == '{"a": "b'
    assert parser.push('c"}')[0].text == 'c"}'


def test_keys_in_another_order_are_read():
    text = '<tool_call>\n{"arguments": {"x": 1}, "name": "now"}\n</tool_call>'
    for cut in (1, None):
        assert parsed(FORMATS["tagged json"], text, cut) == ("", "", [("now", {"x": 1})])


@pytest.mark.parametrize("cut", [1, 2, None])
@pytest.mark.parametrize(
    ("text", "is_thinking", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, ("\nhm\n", "Yes.", [])),
        ("hm</think>Yes.", True, ("hm", "Yes.", [])),
        ("Yes.", False, ("", "Yes.", [])),
        ("<thin", False, ("", "<thin", [])),
        ("only thought", True, ("only thought", "", [])),
        (
            'hm</think><tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
            True,
            ("hm", "", [("now", {})]),
        ),
    ],
)
def test_what_is_thought_is_told_apart(text, is_thinking, expected, cut):
    marks = ("<think>", "</think>")
    style = FORMATS["tagged json"]
    assert parsed(style, text, cut, thought=marks, is_thinking=is_thinking) == expected


def planned(compiler, **options):
    options = {"style": FORMATS["tagged json"], "use": ToolUse(tools=TOOLS), **options}
    return plan(compiler, compiler._vocabulary, **options)


def written(compiler, constraint, text: str) -> None:
    for token in compiler.encode(text):
        mask = constraint.allowed()
        assert mask is None or token in bits(mask), text
        constraint.take(token)


def test_free_text_has_no_mask_until_a_call_begins(compiler):
    constraint = planned(compiler).constrain()
    written(compiler, constraint, 'Hello "name" <tool')
    assert constraint.allowed() is None
    written(compiler, constraint, "_call>")
    assert bits(constraint.allowed()) == [ord("\n")]
    written(compiler, constraint, '\n{"name": ')
    assert {ord('"')} <= {*bits(constraint.allowed())}
    written(compiler, constraint, '"now", "arguments": {}}\n</tool_call>')
    assert not constraint.is_complete  # another call may follow


def test_a_token_that_holds_the_trigger_and_more_is_a_call_only_where_that_fits():
    compiler = compiler_of(tokenizers.byte_level(merges=(">\n", '>{"', "> {", ">(")))

    def after(rest):
        constraint = planned(compiler).constrain()
        written(compiler, constraint, "<tool_call")
        (token,) = compiler.encode(rest)
        constraint.take(token)
        return constraint.allowed()

    assert ord("{") in bits(after(">\n"))
    assert bits(after('>{"')) == [ord("n")]  # the parser reads a call there, too
    assert bits(after("> {")) == [ord('"')]
    assert after(">(") is None


def test_required_calls_begin_at_once_and_name_only_what_may_be_called(compiler):
    use = ToolUse(tools=TOOLS, mode="required", names=frozenset({"now"}), parallel=False)
    text = drawn_from(compiler, planned(compiler, use=use).constrain())
    assert parsed(FORMATS["tagged json"], text) == ("", "", [("now", {})])


def drawn_from(compiler, constraint, seed=0) -> str:
    rng, written = random.Random(seed), b""
    while not constraint.is_complete:
        token = rng.choice(bits(constraint.allowed()))
        if token in compiler.end_ids:
            break
        written += compiler._vocabulary.token_bytes(token)
        constraint.take(token)
    return written.decode()


THINKING = ReasoningStyle(open="<think>", close="</think>")


def test_after_its_budget_a_thought_is_closed(compiler):
    use = ToolUse(tools=TOOLS, mode="required", names=frozenset({"now"}), parallel=False)
    answer = planned(compiler, use=use, reasoning=THINKING, prompt="<think>\n", budget=5)
    constraint = answer.constrain()
    for token in b"hmhmh":
        mask = constraint.allowed()
        assert set(range(32 * len(mask))) - set(bits(mask)) == set(compiler.end_ids)
        constraint.take(token)
    text = drawn_from(compiler, constraint)
    assert text.startswith("</think><tool_call>")


def test_a_budget_waits_for_the_end_of_a_character(compiler):
    constraint = planned(
        compiler, use=None, reasoning=THINKING, prompt="<think>", budget=1
    ).constrain()
    first, second = "é".encode()
    constraint.take(first)
    assert constraint.allowed() is None
    constraint.take(second)
    assert bits(constraint.allowed()) == [compiler.encode("</think>")[0]]


def test_a_thought_that_ends_by_itself_is_not_closed_again(compiler):
    use = ToolUse(tools=TOOLS, mode="required", parallel=False)
    answer = planned(compiler, use=use, reasoning=THINKING, prompt="<think>", budget=500)
    constraint = answer.constrain()
    written(compiler, constraint, "so</think>")
    assert bits(constraint.allowed()) == [ord("<")]


def test_a_bare_call_is_one_only_at_the_start(compiler):
    style = FORMATS["bare json"]
    constraint = planned(compiler, style=style).constrain()
    written(compiler, constraint, '{"name"')
    assert constraint.allowed() is not None
    constraint = planned(compiler, style=style).constrain()
    written(compiler, constraint, 'See {"name"')
    assert constraint.allowed() is None


def test_a_marker_that_is_a_special_token_is_that_token_only():
    tokenizer = tokenizers.byte_level()
    compiler = compiler_of(tokenizer, ends={tokenizers.END_OF_TEXT})
    style = FORMATS["named"].__class__(core="named", lead="<|im_start|>", mid="<|im_end|>")
    use = ToolUse(tools=TOOLS, mode="required", parallel=False)
    answer = plan(compiler, compiler._vocabulary, style=style, use=use)
    constraint, tokens = answer.constrain(), []
    rng = random.Random(3)
    while not constraint.is_complete:
        tokens.append(rng.choice(bits(constraint.allowed())))
        constraint.take(tokens[-1])
    assert tokens[0] == tokenizers.IM_START
    vocabulary = compiler._vocabulary
    text = b"".join(
        answer.marks[t].encode(errors="surrogatepass")
        if t in answer.marks
        else vocabulary.token_bytes(t)
        for t in tokens
    ).decode(errors="surrogatepass")
    parser = answer.parser()
    _, content, ((name, arguments),) = read(parser.push(text) + parser.finish())
    assert not content
    jsonschema.validate(arguments, SCHEMAS[name])
    free = plan(compiler, compiler._vocabulary, style=style, use=ToolUse(tools=TOOLS))
    parser = free.parser()
    typed = "<|im_start|>now<|im_end|>{}"
    assert read(parser.push(typed) + parser.finish()) == ("", typed, [])
