"""The words of a registry entry about calls, thoughts and forms."""

from __future__ import annotations

import json

import pytest

from tests import tokenizers
from tests.api.test_tools import MERGES, MESSAGES, TOOLS
from tests.api.tiny_app import running
from tests.serving.tools.templates import TEMPLATES

SCHEMA = {"type": "object", "properties": {"qzkey": {"const": 1}}, "required": ["qzkey"]}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
ENTRIES = {
    "prompted": {"tools": "prompt"},
    "marked": {"reasoning": ["<r>", "</r>"]},
    "hinted": {"schema_hint": True},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = {
        name: tokenizers.byte_level(
            merges=("<r>", "</r>", *MERGES),
            chat_template=TEMPLATES["xml"] if name in ("xml", "prompted") else tokenizers.CHATML,
        )
        for name in ("xml", "plain", *ENTRIES)
    }
    with running(tmp_path_factory.mktemp("words"), made, ENTRIES) as app:
        yield app.test_client()


def chat(client, model, **fields):
    body = {"model": model, "messages": MESSAGES, "temperature": 1.0, "seed": 1, **fields}
    answer = client.post("/v1/chat/completions", json={"return_token_ids": True, **body})
    assert answer.status_code == 200, answer.json
    (choice,) = answer.json["choices"]
    tokens = {"model": model, "tokens": choice["prompt_token_ids"]}
    return choice, client.post("/detokenize", json=tokens).json["prompt"]


def test_tools_prompt_shows_and_reads_calls_in_our_own_form(client):
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    for model, own in (("prompted", True), ("xml", False)):
        choice, prompt = chat(client, model, max_tokens=900, **fields)
        assert ("You can call functions" in prompt) is own
        (call,) = choice["message"]["tool_calls"]
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_marks_of_an_entry_part_thoughts_from_answers(client):
    bias = {"259": 100}  # <r>
    fields = {"response_format": FORM, "logit_bias": bias, "thinking_budget_tokens": 3}
    choice, _ = chat(client, "marked", max_tokens=60, **fields)
    assert choice["message"]["reasoning_content"]
    assert json.loads(choice["message"]["content"]) == {"qzkey": 1}
    choice, _ = chat(client, "plain", max_tokens=60, response_format=FORM)
    assert "reasoning_content" not in choice["message"]


def test_the_places_of_messages_in_a_traced_prompt_know_the_hint(client):
    body = {"model": "hinted", "messages": MESSAGES, "response_format": FORM, "max_tokens": 1}
    answer = client.post("/v1/chat/completions", json={**body, "trace": {"topk": 1}})
    assert answer.status_code == 200, answer.json


def test_a_hint_tells_the_schema_and_only_a_schema(client):
    for fields, model, is_there in (
        ({"response_format": FORM}, "hinted", True),
        ({"response_format": FORM, "tools": TOOLS}, "hinted", True),
        ({"response_format": FORM}, "plain", False),
        ({"structured_outputs": {"regex": "qzkey"}}, "hinted", False),
        ({}, "hinted", False),
    ):
        _, prompt = chat(client, model, max_tokens=1, **fields)
        assert (json.dumps(SCHEMA, separators=(",", ":")) in prompt) is is_there


@pytest.mark.parametrize(
    ("model", "tools", "reasoning"),
    [
        ("xml", "derived", False),
        ("prompted", "prompt", False),
        ("plain", "prompt", False),
        ("marked", "prompt", True),
        ("hinted", "prompt", False),
    ],
)
def test_a_model_tells_how_it_answers_without_being_loaded(client, model, tools, reasoning):
    answer = client.get(f"/v1/models/{model}").json
    keys = ("tools", "reasoning", "structured_outputs")
    assert [answer[key] for key in keys] == [tools, reasoning, True]
    assert "format" not in answer
    listed = {entry["id"]: entry for entry in client.get("/v1/models").json["data"]}[model]
    assert not set(keys) & set(listed)  # reads no tokenizers
    assert ("reasoning" in listed["capabilities"]) is reasoning
    assert ("tools" in listed["capabilities"]) is (tools == "derived")


def test_a_model_shows_the_format_of_its_calls_and_thoughts(client):
    def format_of(model, word="1"):
        return client.get(f"/v1/models/{model}?format={word}").json["format"]

    derived, own = format_of("xml"), format_of("prompted", "true")
    assert derived["thoughts"] is own["thoughts"] is None
    assert derived["calls"] != own["calls"]
    assert (own["calls"]["core"], own["calls"]["lead"]) == ("json", "<tool_call>\n")
    assert own == format_of("plain")
    marks = format_of("marked")["thoughts"]
    assert (marks["open"], marks["close"]) == ("<r>", "</r>")
    assert "format" not in client.get("/v1/models/xml?format=0").json


def test_a_resident_model_tells_the_same(client):
    before = client.get("/v1/models/marked?format=1").json
    chat(client, "marked", max_tokens=1)
    after = client.get("/v1/models/marked?format=1").json
    assert after["loaded"]
    assert {k: after[k] for k in before if k != "loaded"} == {
        k: before[k] for k in before if k != "loaded"
    }
