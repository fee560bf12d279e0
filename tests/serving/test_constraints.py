"""Formats held by construction: tokens drawn at random under a grammar, and then checked."""

from __future__ import annotations

import gc
import json
import random
import re
import time
import weakref
from contextlib import suppress

import jsonschema
import numpy
import pytest

from tests import tokenizers
from transformers_api.errors import ConstraintsUnavailable, InvalidRequest, Overloaded
from transformers_api.heap import used_bytes
from transformers_api.serving.constraints import compiler as compiling
from transformers_api.serving.constraints.compiler import (
    MAX_COMPILED,
    MAX_COMPILED_BYTES,
    Compiler,
)
from transformers_api.serving.constraints.json_schema import ANY_OBJECT, json_constraint
from transformers_api.serving.constraints.phases import Phases
from transformers_api.serving.constraints.text_grammars import (
    choice_constraint,
    grammar_constraint,
    regex_constraint,
    tags_constraint,
)
from transformers_api.serving.text.vocabulary import Vocabulary

WORDS = ('{"', '":', '", "', "true", "name", "null", "}]", "hello", " a", "12")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def compiler_of(tokenizer, ends=None) -> Compiler:
    ends = {tokenizer.eos_token_id} if ends is None else ends
    return Compiler(tokenizer, Vocabulary(tokenizer), len(tokenizer), ends)


@pytest.fixture(scope="module")
def compiler():
    return compiler_of(tokenizers.byte_level(merges=WORDS))


def bits(mask) -> list[int]:
    return numpy.flatnonzero(numpy.unpackbits(mask.view(numpy.uint8), bitorder="little")).tolist()


def drawn(compiler, spec, rng, most=600, **options) -> tuple[str, bool]:
    """A random answer, and whether it is whole."""
    constraint, written = compiler.compile(spec).start(**options), []
    while len(written) < most:
        token = rng.choice(bits(constraint.allowed()))
        if token in compiler.end_ids:
            return text_of(compiler, written), True
        written.append(token)
        constraint.take(token)
        if constraint.is_complete:
            return text_of(compiler, written), True
    return text_of(compiler, written), False


def text_of(compiler, tokens) -> str:
    vocabulary = compiler._vocabulary
    return b"".join(map(vocabulary.token_bytes, tokens)).decode(errors="replace")


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "anyOf"])
    match kind:
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 8)}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "enum":
            return {"enum": [rng.choice(["a", 'q"uote', "ü", 7, None, True]) for _ in range(3)]}
        case "const":
            return {"const": {"k": [1, "two"]}}
        case "array":
            most = rng.randint(0, 3)
            return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": most}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
        case "object":
            names = rng.sample(["a", "b", "c c", 'd"', "é"], rng.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False,
            }
    return {"type": kind}


def check_schemas(compiler, seeds) -> int:
    whole = 0
    for seed in seeds:
        rng = random.Random(seed)
        schema = random_schema(rng)
        text, is_whole = drawn(compiler, json_constraint(schema, "schema", strict=True), rng)
        if is_whole:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            whole += 1
    return whole


def test_random_tokens_under_random_schemas_are_valid_json(compiler):
    assert check_schemas(compiler, range(200)) >= 195


@pytest.mark.slow
def test_of_ten_thousand_random_answers_none_is_invalid(compiler):
    assert check_schemas(compiler, range(1000, 11_000)) >= 9_800


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_tokens_are_held_too(seed):
    compiler = compiler_of(tokenizers.sentencepiece())
    text, is_whole = drawn(compiler, json_constraint(PERSON, "schema"), random.Random(seed))
    assert is_whole
    jsonschema.validate(json.loads(text), PERSON)


def test_any_object_is_an_object(compiler):
    for seed in range(20):
        text, is_whole = drawn(compiler, json_constraint(ANY_OBJECT, "f"), random.Random(seed))
        if is_whole:
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (regex_constraint("[0-9]{3}-[a-c]{1,4}", "regex"), "[0-9]{3}-[a-c]{1,4}"),
        (choice_constraint(["yes", "no", 'a\n"b', "<|im_end|>", "é"], "c"), None),
        (grammar_constraint('root ::= "a" [0-9]{2,5} "b"', "grammar"), "a[0-9]{2,5}b"),
        (grammar_constraint('start: "x" /[a-c]{2}/ | "y"', "grammar"), "x[a-c]{2}|y"),
    ],
)
def test_what_is_no_json_matches_as_a_whole(compiler, spec, pattern):
    seen = set()
    for seed in range(40):
        text, is_whole = drawn(compiler, spec, random.Random(seed))
        assert is_whole
        seen.add(text)
        if pattern is None:
            assert text in ("yes", "no", 'a\n"b', "<|im_end|>", "é")
        else:
            assert re.fullmatch(pattern, text)
    assert len(seen) > 2


def test_a_tag_holds_its_schema_and_text_is_free_around_it(compiler):
    structures = [{"begin": "<f>", "schema": {"const": {"k": 1}}, "end": "</f>"}]
    spec = tags_constraint(structures, ["<f"], "structural_tag")
    grammar = compiler.compile(spec)
    assert grammar.fits(compiler.encode('free text <f>{"k":1}</f> and more'))
    assert not grammar.fits(compiler.encode("<f>{}"))


def test_end_tokens_come_exactly_where_the_answer_may_end(compiler):
    constraint = compiler.compile(regex_constraint("a{1,2}b?", "regex")).start()
    assert compiler.end_ids[0] not in bits(constraint.allowed())
    constraint.take(ord("a"))
    assert compiler.end_ids[0] in bits(constraint.allowed())
    assert not constraint.is_complete


def test_several_end_tokens_all_end_it():
    tokenizer = tokenizers.byte_level()
    ends = {tokenizers.IM_END, tokenizers.END_OF_TEXT}
    constraint = compiler_of(tokenizer, ends).compile(regex_constraint("a?", "r")).start()
    assert ends <= {*bits(constraint.allowed())}


def test_a_model_without_an_end_can_be_held_and_completes():
    compiler = compiler_of(tokenizers.byte_level(), ends=set())
    text, is_whole = drawn(compiler, json_constraint(PERSON, "s"), random.Random(1))
    assert is_whole
    jsonschema.validate(json.loads(text), PERSON)


def test_forbidden_tokens_never_come(compiler):
    grammar = compiler.compile(regex_constraint("[ab]{0,3}", "regex"))
    constraint = grammar.start(forbidden=[compiler.end_ids[0], ord("b")])
    assert bits(constraint.allowed()) == [ord("a")]
    constraint.take(ord("a"))
    assert bits(constraint.allowed()) == [ord("a")]


def test_copies_do_not_know_each_other(compiler):
    grammar = compiler.compile(regex_constraint("ab|cd", "regex"))
    one, two = grammar.start(), grammar.start()
    one.take(ord("a"))
    two.take(ord("c"))
    assert bits(one.allowed()) == [ord("b")]
    assert bits(two.allowed()) == [ord("d")]


def test_what_can_only_follow_is_cut_as_the_tokenizer_cuts_it_and_proposed(compiler):
    grammar = compiler.compile(regex_constraint(r'([a-c]\{"name":[0-9]|d"name")+', "regex"))
    constraint = grammar.start()
    constraint.take(ord("b"))
    draft = constraint.draft(3)
    assert draft == compiler.encode('{"name":')[:3]
    for token in draft:
        assert bits(constraint.allowed()) == [token]
        constraint.take(token)
    assert bits(constraint.allowed()) == [*range(ord("0"), ord("9") + 1)]
    assert list(constraint.draft(3)) == []


def test_a_text_that_was_cut_otherwise_before_goes_on(compiler):
    grammar = compiler.compile(regex_constraint('b"name":[0-9]', "regex"))
    constraint = grammar.start([ord(letter) for letter in 'b"na'])
    assert text_of(compiler, constraint.draft(8)).startswith("me")


def test_a_compiled_grammar_is_kept_and_only_so_many(compiler):
    spec = json_constraint(PERSON, "schema")
    grammar = compiler.compile(spec)
    assert compiler.compile(json_constraint(PERSON, "schema")) is grammar
    for number in range(MAX_COMPILED):
        compiler.compile(regex_constraint(f"a{number}", "regex"))
    assert compiler.compile(spec) is not grammar


def test_large_grammars_are_forgotten_before_they_fill_the_memory(compiler):
    """One of a{300000} takes 36 MB, and a short pattern asks for it."""
    before = used_bytes()
    for number in range(8):
        compiler.compile(regex_constraint(f"a{{{300_000 + number}}}", "regex"))
    assert used_bytes() - before < MAX_COMPILED_BYTES + (16 << 20)


def test_grammars_in_use_take_only_so_much_and_the_next_one_has_to_wait(compiler, monkeypatch):
    monkeypatch.setattr(compiling, "MAX_LIVE_BYTES", 60 << 20)
    uses = [
        compiler.compile(regex_constraint(f"a{{{400_000 + number}}}", "regex")).start()
        for number in range(2)
    ]
    with pytest.raises(Overloaded, match="formats"):
        compiler.compile(regex_constraint("b", "regex"))
    uses.clear()
    assert compiler.compile(regex_constraint("b", "regex"))


def test_what_holds_an_answer_to_its_form_is_gone_with_it(compiler):
    """It shares the grammar's memory, and the collector of circles may not come for long."""
    grammar = compiler.compile(regex_constraint("ab", "regex"))
    gc.disable()
    try:
        constraint = Phases(grammar=grammar).start(compiler, compiler._vocabulary)
        constraint.take(ord("a"))
        reference = weakref.ref(constraint)
        del constraint
        assert reference() is None
    finally:
        gc.enable()


def test_white_space_is_bounded_so_that_answers_end(compiler):
    ended = [drawn(compiler, json_constraint(PERSON, "s"), random.Random(s))[1] for s in range(20)]
    assert all(ended)


def test_white_space_may_be_asked_for(compiler):
    spec = json_constraint({"const": [1, 2]}, "s", whitespace="[\n ]?")
    texts = {drawn(compiler, spec, random.Random(seed))[0] for seed in range(30)}
    assert len(texts) > 2
    assert {json.dumps(json.loads(text)) for text in texts} == {"[1, 2]"}
    spec = json_constraint({"const": [1, 2]}, "s", whitespace="")
    assert {drawn(compiler, spec, random.Random(seed))[0] for seed in range(9)} == {"[1,2]"}


def test_keywords_that_cannot_be_enforced_are_refused_or_told():
    compiler = compiler_of(tokenizers.byte_level())
    schema = {"type": "array", "uniqueItems": True, "maxItems": 2, "items": {"type": "null"}}
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        compiler.compile(json_constraint(schema, "schema", strict=True))
    assert "uniqueItems" in "".join(compiler.compile(json_constraint(schema, "schema")).warnings)


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused():
    with pytest.raises(ConstraintsUnavailable):
        compiler_of(tokenizers.wordpiece()).compile(regex_constraint("a", "regex"))


def deep(levels: int) -> dict:
    schema = {"type": "boolean"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED = [
    {"enum": [f"v{i}" for i in range(20_001)]},
    {"type": "object", "properties": {f"k{i}": {} for i in range(501)}},
    {"type": "string", "pattern": "a" * 5000},
    {"description": "x" * (129 << 10)},
    {"anyOf": [{"type": "null", "title": str(i)} for i in range(8_000)]},
    deep(60),
]


@pytest.mark.parametrize("schema", [*REFUSED, True, [], "x", None])
def test_schemas_beyond_the_bounds_are_refused_before_they_are_compiled(schema):
    with pytest.raises(InvalidRequest) as caught:
        json_constraint(schema, "response_format.json_schema.schema")
    assert caught.value.param == "response_format.json_schema.schema"


HOSTILE = {
    "backtracking": {"type": "string", "pattern": "^(a+)+b$"},
    "count": {"type": "string", "pattern": "^(x*y*){200}$"},
    "long": {"type": "string", "maxLength": 10**9},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 10**6},
    "self": {"$ref": "#"},
    "endless": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
    },
    "web": {"$ref": "http://127.0.0.1:9/x.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "missing": {"$ref": "#/$defs/nope"},
    "never": {"type": "string", "minLength": 5, "maxLength": 2},
    "options": {"x-guidance": {"whitespace_pattern": ".*"}, "type": "integer"},
    "product": {
        "allOf": [
            {"anyOf": [{"required": [f"p{i}"], "properties": {f"p{i}": {"const": j}}} for j in range(3)]}
            for i in range(12)
        ]
    },
    "doubling": {
        "$ref": "#/$defs/d0",
        "$defs": {
            f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2, "minItems": 2}
            for i in range(40)
        }
        | {"d40": {"type": "boolean"}},
    },
    "properties": {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(500)}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_compiled_or_refused_soon(compiler, name):
    began = time.thread_time()
    spec = json_constraint(HOSTILE[name], "schema")
    with suppress(InvalidRequest):  # ConstraintFailed too: the answer ends with an error
        drawn(compiler, spec, random.Random(0), most=20)
    assert time.thread_time() - began < 5


@pytest.mark.parametrize(
    "grammar",
    [
        "\n" * 60_000 + 'root ::= "a"',
        'root ::= "a"' + " \n" * 30_000 + 'x ::= "a"',
        'root ::= r0 "a"\n' + "".join(f'r{i} ::= r{i + 1}\n' for i in range(3000)) + 'r3000 ::= "b"',
        'root ::= r0\nq ::= ' + '"a" ' * 9000 + "r0\n"
        + "".join(f"r{i} ::= r{i + 1}\n" for i in range(1000)) + 'r1000 ::= "b"',
    ],
)  # fmt: skip
def test_a_grammar_is_read_in_a_time_that_its_length_bounds(compiler, grammar):
    began = time.thread_time()
    compiler.compile(grammar_constraint(grammar, "grammar"))
    assert time.thread_time() - began < 5


def test_rules_of_a_grammar_may_stand_in_any_order_and_in_circles(compiler):
    grammar = 'x-Y ::= "b" | "c"\nroot ::= "a" x-Y tail\ntail ::= "" | "," x-Y tail'
    pattern = re.compile("a[bc](,[bc])*")
    for seed in range(10):
        text, is_over = drawn(
            compiler, grammar_constraint(grammar, "g"), random.Random(seed), most=30
        )
        assert not is_over or pattern.fullmatch(text)


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|><|im_end|>", "<<|endoftext|>"])
def test_what_spells_a_control_token_is_written_as_text(compiler, text):
    for spec in (choice_constraint([text], "c"), json_constraint({"const": text}, "j")):
        assert drawn(compiler, spec, random.Random(0))[0].strip('"') == text


@pytest.mark.parametrize(
    "make",
    [
        lambda: regex_constraint("(?=a)b", "f"),
        lambda: regex_constraint("([", "f"),
        lambda: grammar_constraint("root := 3", "f"),
        lambda: grammar_constraint("root ::= " + "(" * 20_000, "f"),
        lambda: grammar_constraint("start: nowhere", "f"),
        lambda: grammar_constraint("start: start", "f"),
        lambda: json_constraint({"type": "strnig"}, "f"),
        lambda: json_constraint({"enum": []}, "f"),
    ],
)
def test_what_does_not_compile_is_the_fields_fault_in_one_line(compiler, make):
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(make())
    assert caught.value.param == "f"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
