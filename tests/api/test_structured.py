"""Answers that were asked to have a form have it: a real engine, a random model."""

from __future__ import annotations

import json
import re

import jsonschema
import orjson
import pytest

from tests import tokenizers
from tests.api.conftest import events
from tests.api.test_bodies import error
from tests.api.tiny_app import running

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "trip", "strict": True, "schema": SCHEMA}}
MESSAGES = [{"role": "user", "content": "Where to?"}]
GBNF = 'root ::= "a" [0-9]{2} "b"'
TAG = {"begin": "<t>", "schema": {"const": 1}, "end": "</t>"}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    merges = ('{"', '":', '", "', "city", "days", "unit")
    folder = tmp_path_factory.mktemp("tiny")
    with running(folder, {"tiny": tokenizers.byte_level(merges=merges)}) as app:
        yield app.test_client()


def chat(client, **fields):
    body = {"messages": MESSAGES, "temperature": 1.0, "seed": 1, "max_tokens": 300, **fields}
    return client.post("/v1/chat/completions", json=body)


def content(response) -> str:
    assert response.status_code == 200, response.json
    (choice,) = response.json["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


def is_trip(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def is_like(pattern: str):
    return lambda text: re.fullmatch(pattern, text, re.DOTALL)


FORMS = {
    "json_schema": ({"response_format": NAMED}, is_trip),
    "lenient": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}}},
        is_trip,
    ),
    "llama.cpp json_schema": ({"json_schema": SCHEMA}, is_trip),
    "llama.cpp response_format": (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        is_trip,
    ),
    "regex format": ({"response_format": {"type": "regex", "pattern": "[ab]{3}"}}, is_like("[ab]{3}")),
    "grammar format": ({"response_format": {"type": "grammar", "grammar": GBNF}}, is_like("a[0-9]{2}b")),
    "json": ({"structured_outputs": {"json": SCHEMA}}, is_trip),
    "json as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_trip),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, is_like("yes|no")),
    "no white space": (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        lambda text: is_trip(text) and orjson.dumps(json.loads(text)).decode() == text,
    ),
    "closed": (
        {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"const": 1}}},
                                "disable_additional_properties": True}},
        is_like(r'\{("a": ?1)?\}'),
    ),
    "guided_json": ({"guided_json": SCHEMA}, is_trip),
    "guided_regex": ({"guided_regex": "x[0-9]{2}"}, is_like("x[0-9]{2}")),
    "guided_choice": ({"guided_choice": ["left", "right"]}, is_like("left|right")),
    "guided_grammar": ({"guided_grammar": GBNF}, is_like("a[0-9]{2}b")),
    "grammar": ({"grammar": GBNF}, is_like("a[0-9]{2}b")),
    "regex": ({"regex": "x[0-9]{2}"}, is_like("x[0-9]{2}")),
    "ebnf": ({"ebnf": GBNF}, is_like("a[0-9]{2}b")),
    "lark": ({"grammar": 'start: "u" /[v-w]{2}/'}, is_like("u[vw]{2}")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_held_on_chat_and_completions_and_in_streams(client, name):
    fields, holds = FORMS[name]
    whole = chat(client, **fields)
    assert holds(content(whole))
    streamed = events(chat(client, stream=True, **fields))
    assert streamed.done
    assert streamed.text() == content(whole)
    assert streamed.reasons() == [(0, "stop")]
    body = {"prompt": "Where", "max_tokens": 300, "seed": 2, **fields}
    answer = client.post("/v1/completions", json=body).json
    assert holds(answer["choices"][0]["text"])


def test_an_object_is_an_object_or_ends_by_its_length(client):
    for seed in range(10):
        response = chat(client, response_format={"type": "json_object"}, seed=seed)
        (choice,) = response.json["choices"]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert choice["finish_reason"] == "length"
            assert text.startswith("{")


def test_the_length_ends_a_form_early_and_says_so(client):
    response = chat(client, response_format=NAMED, max_tokens=5)
    assert response.json["choices"][0]["finish_reason"] == "length"


def test_several_answers_have_the_form_each(client):
    response = chat(client, response_format=NAMED, n=3, temperature=1.5)
    texts = [choice["message"]["content"] for choice in response.json["choices"]]
    assert all(map(is_trip, texts))
    assert len(set(texts)) == 3


def test_scores_come_with_a_form(client):
    response = chat(client, response_format=NAMED, logprobs=True, top_logprobs=2)
    (choice,) = response.json["choices"]
    scored = choice["logprobs"]["content"]
    spelt = b"".join(bytes(token["bytes"]) for token in scored)
    assert spelt.decode() == choice["message"]["content"]


def test_stop_strings_apply_to_a_form(client):
    response = chat(client, response_format=NAMED, stop=["days"])
    assert '"city"' in content(response)
    assert "days" not in content(response)


def test_an_answer_ends_by_its_form_where_end_tokens_are_ignored(client):
    assert is_trip(content(chat(client, response_format=NAMED, ignore_eos=True)))


def test_a_form_goes_on_from_what_was_begun(client):
    begun = [*MESSAGES, {"role": "assistant", "content": '{"city": "Ro'}]
    fields = {"response_format": NAMED, "messages": begun, "continue_final_message": True}
    rest = content(chat(client, add_generation_prompt=False, **fields))
    assert is_trip('{"city": "Ro' + rest)
    begun[-1]["content"] = "no json"
    assert error(chat(client, **fields), 400)["param"] == "messages"


def test_what_a_lenient_schema_does_not_enforce_stands_in_a_header(client):
    schema = {"type": "array", "items": {"type": "null"}, "maxItems": 2, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for stream in (False, True):
        response = chat(client, response_format=form, stream=stream)
        assert "uniqueItems" in response.headers["X-Schema-Ignored"]
        response.close()
    form["json_schema"]["strict"] = True
    refused = error(chat(client, response_format=form), 400)
    assert refused["param"] == "response_format.json_schema.schema"
    assert "uniqueItems" in refused["message"]


def test_neutral_values_ask_for_nothing(client):
    free = content_of_any(chat(client, max_tokens=8))
    for fields in ({"response_format": {"type": "text"}}, {"grammar": ""}, {"guided_json": None}):
        assert content_of_any(chat(client, max_tokens=8, **fields)) == free


def content_of_any(response) -> str:
    assert response.status_code == 200, response.json
    return response.json["choices"][0]["message"]["content"]


def test_nobody_elses_tokens_change(client):
    free = content_of_any(chat(client, max_tokens=30, seed=7))
    bound = events(chat(client, stream=True, response_format=NAMED, n=4))
    assert bound.done
    assert content_of_any(chat(client, max_tokens=30, seed=7)) == free


BAD = {
    "response_format": [
        ("text", "response_format"),
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}}},
            "response_format.json_schema.name",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.name",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a"}},
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": [], "strict": True}},
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": "yes"}},
            "response_format.json_schema.strict",
        ),
        ({"type": "regex"}, "response_format.pattern"),
        ({"type": "grammar", "grammar": 5}, "response_format.grammar"),
        ({"type": "structural_tag"}, "response_format.structures"),
        ({"type": "structural_tag", "structures": [TAG]}, "response_format.triggers"),
        (
            {"type": "structural_tag", "structures": [TAG], "triggers": ["<x"]},
            "response_format.structures[0]",
        ),
    ],
    "structured_outputs": [
        ({}, "structured_outputs"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs"),
        ({"regex": "a("}, "structured_outputs.regex"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": [1]}, "structured_outputs.choice"),
        ({"json": {}, "whitespace_pattern": " *"}, "structured_outputs.whitespace_pattern"),
        ({"json_object": 1}, "structured_outputs.json_object"),
    ],
    "guided_regex": [("(?=a)", "guided_regex"), (5, "guided_regex")],
    "guided_choice": [("a", "guided_choice"), ([""], "guided_choice[0]")],
    "guided_json": [("{", "guided_json"), (7, "guided_json")],
    "grammar": [("root :=", "grammar"), ("x" * 70_000, "grammar")],
}


@pytest.mark.parametrize(
    ("field", "value", "param"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_a_wrong_form_is_a_400_that_names_the_field(client, field, value, param):
    assert error(chat(client, **{field: value}), 400)["param"].startswith(param)


def test_two_forms_at_once_are_refused_by_both_names(client):
    refused = error(chat(client, response_format=NAMED, guided_regex="a"), 400)
    assert "'response_format'" in refused["message"]
    assert refused["param"] == "guided_regex"


def test_scoring_alone_has_no_form(client):
    body = {"prompt": "a", "echo": True, "max_tokens": 0, "regex": "a"}
    assert error(client.post("/v1/completions", json=body), 400)["param"] == "max_tokens"


def test_a_bias_against_all_that_the_form_allows_changes_nothing_of_it(client):
    bias = {str(token): -100.0 for token in range(256)}
    fields = {"guided_choice": ["yes", "no"], "temperature": 0}
    assert content(chat(client, logit_bias=bias, **fields)) in ("yes", "no")
