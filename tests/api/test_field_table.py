"""The table of fields: what the code does with each is what it says, and docs/api.md too."""

from __future__ import annotations

from pathlib import Path

import openai.types as openai_types
import pytest
from openai.types.chat import completion_create_params as chat_params

from tests.api.test_bodies import error
from transformers_api.api.http.field_table import (
    ASKS_NOTHING,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    TABLE,
    Treatment,
    of_route,
)
from transformers_api.api.openai.schemas.chat import ChatRequest
from transformers_api.api.openai.schemas.completions import CompletionRequest
from transformers_api.api.openai.schemas.embeddings import EmbeddingRequest

SCHEMAS = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest, EMBEDDINGS: EmbeddingRequest}
DOC = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
ASKING = ("zz", 7, 0.123, True, ["zz"], {"zz": 1}, False)  # one of them is never neutral


def entries(treatment, route):
    return [entry for entry in of_route(route).values() if entry.treatment is treatment]


def ask(served, route, **fields):
    return (served.chat if route == CHAT else served.complete)(**fields)


@pytest.mark.parametrize("route", SCHEMAS)
def test_what_the_table_calls_supported_is_what_the_schema_declares(route):
    supported = {name for name, e in of_route(route).items() if e.treatment is Treatment.SUPPORTED}
    assert supported == set(SCHEMAS[route]().fields)


@pytest.mark.parametrize("route", SCHEMAS)
def test_no_field_is_there_twice_and_aliases_stand_for_supported_ones(route):
    names = [entry.name for entry in TABLE if route in entry.routes]
    assert len(names) == len(set(names))
    table = of_route(route)
    aliases = [entry for entry in table.values() if entry.treatment is Treatment.ALIAS]
    assert {table[entry.of].treatment for entry in aliases} == {Treatment.SUPPORTED}


@pytest.mark.parametrize(
    ("route", "params"),
    [
        (CHAT, chat_params.CompletionCreateParamsNonStreaming),
        (COMPLETIONS, openai_types.completion_create_params.CompletionCreateParamsNonStreaming),
        (EMBEDDINGS, openai_types.EmbeddingCreateParams),
    ],
)
def test_every_field_of_the_official_client_is_in_the_table(route, params):
    assert set(params.__required_keys__ | params.__optional_keys__) <= set(of_route(route))


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_refused_field_is_refused_by_name_unless_it_asks_for_nothing(served, route):
    for entry in entries(Treatment.REFUSED, route):
        asking = next(value for value in ASKING if value not in entry.neutral)
        body = error(ask(served, route, **{entry.name: asking}))
        assert (body["param"], body["code"]) == (entry.name, "unsupported_parameter")
        assert served.engine.submitted == []
    for entry in entries(Treatment.REFUSED, route):
        for value in (None, *entry.neutral):
            assert ask(served, route, **{entry.name: value}).status_code == 200


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_harmless_fields_change_nothing(served, route):
    plain = ask(served, route, seed=1).get_json()["choices"]
    names = [entry.name for entry in entries(Treatment.HARMLESS, route)]
    for value in ASKING:
        fields = dict.fromkeys(names, value)
        assert ask(served, route, seed=1, **fields).get_json()["choices"] == plain


ALIASED = {
    "max_tokens": 3,
    "min_tokens": 2,
    "n": 2,
    "stop": ["e"],
    "typical_p": 0.5,
    "repetition_penalty": 1.5,
    "repeat_last_n": 7,
    "include_stop_str_in_output": True,
}


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_an_alias_does_what_its_field_does(served, route):
    for entry in entries(Treatment.ALIAS, route):
        value = ALIASED[entry.of]
        field = {"seed": 1, entry.of: value}
        alias = {"seed": 1, entry.name: value}
        choices = ask(served, route, **field).get_json()["choices"]
        assert ask(served, route, **alias).get_json()["choices"] == choices
        assert ask(served, route, **field | alias).status_code == 200
        first, second, third = (submit[0].params for submit in served.engine.submitted[-3:])
        assert first == second == third


def test_an_alias_that_differs_from_its_field_is_refused(served):
    body = error(served.complete(max_tokens=5, n_predict=6))
    assert body["param"] == "n_predict"
    assert "'max_tokens'" in body["message"]


@pytest.mark.parametrize("name", ["n_predict", "max_new_tokens", "num_predict"])
def test_a_bad_value_of_an_alias_is_told_by_the_name_that_was_sent(served, name):
    body = error(served.complete(**{name: "five"}))
    assert body["param"] == name
    assert body["message"].startswith(f"'{name}' must be an integer")


def test_a_field_in_no_table_is_ignored(served):
    assert served.chat(zz={"a": 1}).status_code == 200


def test_every_field_of_the_table_is_in_the_documents():
    for entry in TABLE:
        if entry.treatment is Treatment.HARMLESS:
            assert f"`{entry.name}`" in DOC
        else:
            assert f"\n| `{entry.name}` |" in DOC
        if entry.treatment is Treatment.REFUSED and entry.neutral is ASKS_NOTHING:
            assert f"\n| `{entry.name}` | `false`, `0`, empty |" in DOC
