"""Bodies that only look right: every one is answered or refused, with the field's name."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests import tokenizers
from tests.api.test_bodies import error
from tests.api.tiny_app import running
from tests.serving.tools.templates import TEMPLATES

MESSAGES = [{"role": "user", "content": "Weather?"}]
FORMS = {"plain": tokenizers.CHATML} | {
    name.replace(" ", "-"): TEMPLATES[name] for name in ("arguments as text", "quoted", "xml")
}
DEEP = '{"a":' * 300 + "1" + "}" * 300


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = {name: tokenizers.byte_level(chat_template=text) for name, text in FORMS.items()}
    with running(tmp_path_factory.mktemp("bodies"), made) as app:
        yield app.test_client()


def tool(parameters):
    return {"type": "function", "function": {"name": "now", "parameters": parameters}}


def argument(schema):
    return tool({"type": "object", "properties": {"a": schema}, "required": ["a"]})


def called(client, schema, **fields):
    """The answer to a request whose one tool has one argument, by ``schema``."""
    body = {"messages": MESSAGES, "tools": [argument(schema)], "tool_choice": "required"}
    return client.post("/v1/chat/completions", json={**body, "max_tokens": 300, **fields})


@pytest.mark.parametrize("model", ["plain", "arguments-as-text"])
@pytest.mark.parametrize(
    "arguments", ['{"a": 1e999}', '{"a": %s}' % ("9" * 30), r'{"a": "\ud800"}', DEEP, '{"a": NaN}']
)
def test_calls_of_a_history_may_have_arguments_that_are_no_json(client, model, arguments):
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
    turns = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "12"},
    ]
    body = {"messages": turns, "max_tokens": 1, "model": model}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("name", ["thinking_budget_tokens", "reasoning_budget"])
def test_a_budget_of_minus_one_is_none(client, name):
    body = {"messages": MESSAGES, "max_tokens": 1, name: -1}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "tool", "tool_name": ["now"]}, "tool_name"),
        ({"role": "tool", "name": {}, "content": "x"}, None),  # nothing is named by it
        ({"role": "tool", "tool_call_id": 5}, "tool_call_id"),
        ({"role": "assistant", "tool_calls": 7}, "tool_calls"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "tool_calls"),
    ],
)
def test_ollama_names_the_field_of_a_turn_that_is_wrong(client, message, field):
    body = {"messages": [message], "stream": False, "options": {"num_predict": 1}}
    response = client.post("/api/chat", json=body)
    assert response.status_code == 400
    assert f"messages[0].{field or 'name'}" in response.get_json()["error"]


@pytest.mark.parametrize("kind", [[[]], {}, 5, "x"])
def test_an_item_of_a_response_has_a_type_that_there_is(client, kind):
    response = client.post("/v1/responses", json={"input": [{"type": kind, "content": "Hi"}]})
    assert response.status_code == 400
    assert error(response)["param"] == "input[0]"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_message_without_any_turn_is_refused(client, path):
    body = {"messages": [{"role": "system", "content": []}]}
    if path == "/v1/messages":
        body["max_tokens"] = 1
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert "'messages'" in response.get_json()["error"]["message"]


@pytest.mark.parametrize("model", FORMS)
@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"properties": [1]}, "properties"),
        ({"properties": 0}, "properties"),
        ({"required": 5}, "required"),
        ({"required": [[]]}, "required"),
    ],
)
def test_parameters_whose_names_cannot_be_read_are_refused(client, model, parameters, field):
    body = {"messages": MESSAGES, "tools": [tool(parameters)], "model": model, "max_tokens": 1}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert error(response)["param"] == f"tools[0].function.parameters.{field}"


@pytest.mark.parametrize("model", ["quoted", "xml"])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "enum": []},
        {"type": "string", "maxLength": "9}/ | /x", "minLength": []},
        {"type": "array", "items": True, "maxItems": "x"},
        {"type": "array", "items": [{"type": "string"}], "maxItems": -1},
        {"type": "object", "properties": [1]},
        {"type": "object", "properties": {"b": True}},
    ],
)
def test_odd_schemas_of_arguments_never_fail_the_server(client, model, schema):
    assert called(client, schema, model=model, max_tokens=20).status_code in (200, 400)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"^a\/b$", "a/b"),
        (r"^a/b$", "a/b"),
        (r"^https?:\/\/x$", "https"),
        (r"^a\$$", "a$"),
        ("^a\nb$", "a\nb"),
    ],
)
def test_a_pattern_of_an_argument_may_hold_slashes_and_line_breaks(client, pattern, text):
    response = called(client, {"type": "string", "pattern": pattern}, model="xml")
    call, *_ = response.get_json()["choices"][0]["message"]["tool_calls"]
    value = json.loads(call["function"]["arguments"])["a"]
    assert value == text or value.startswith("http")


def test_a_form_may_be_a_regular_expression_with_slashes_beside_tools(client):
    fields = {"response_format": {"type": "regex", "pattern": r"a\/b/c"}, "max_tokens": 300}
    body = {"messages": MESSAGES, "tools": [tool({})], "temperature": 1.0, **fields}
    for seed in range(4):
        response = client.post("/v1/chat/completions", json={**body, "seed": seed})
        (choice,) = response.get_json()["choices"]
        message = choice["message"]
        is_cut = choice["finish_reason"] == "length"  # within the arguments of a call
        assert is_cut or message["content"] == "a/b/c" or message["tool_calls"]
        assert not is_cut or message["content"].startswith("<tool_call>")


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>user", "a<|endoftext|>b"])
def test_a_form_may_spell_a_control_token(client, text):
    for fields in ({"guided_choice": [text]}, {"json_schema": {"const": text}}):
        body = {"messages": MESSAGES, "max_tokens": 60, **fields}
        (choice,) = client.post("/v1/chat/completions", json=body).get_json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"].strip('"') == text


@pytest.mark.parametrize("character", ["\0", "\x1b", "\x7f", "\r\nX-Other: ", "é"])
def test_no_keyword_of_a_schema_gets_a_control_character_into_a_header(client, character):
    schema = {"type": "string", "format": f"a{character}b"}
    body = {"messages": MESSAGES, "max_tokens": 1, "json_schema": schema}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    header = response.headers["X-Schema-Ignored"]
    assert header.isascii()
    assert header.isprintable()
    assert "X-Other" not in response.headers


NODE = {
    "type": "object",
    "properties": {
        "k": {"enum": [1, 2]},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]},
    },
    "required": ["k", "next"],
    "additionalProperties": False,
}
REFERRING = {
    "definitions": {
        "type": "object",
        "properties": {"v": {"$ref": "#/$defs/n"}, "$ref": {"const": "#"}},
        "required": ["v", "$ref"],
        "additionalProperties": False,
        "$defs": {"n": NODE},
    },
    "itself": {
        "type": "object",
        "properties": {"x": {"const": 1}, "child": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["x", "child"],
        "additionalProperties": False,
    },
    "a property": {
        "type": "object",
        "properties": {"a/b": {"enum": [1, 2]}, "c": {"$ref": "#/properties/a~1b"}},
        "required": ["a/b", "c"],
        "additionalProperties": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", FORMS)
@pytest.mark.parametrize("name", REFERRING)
def test_parameters_may_refer_to_their_own_definitions(client, model, name):
    schema = REFERRING[name]
    body = {"messages": MESSAGES, "tools": [tool(schema)], "tool_choice": "required"}
    whole = 0
    for seed in range(4):
        fields = {"model": model, "seed": seed, "max_tokens": 600, "parallel_tool_calls": False}
        response = client.post("/v1/chat/completions", json={**body, **fields, "temperature": 1.0})
        (choice,) = response.get_json()["choices"]
        if choice["finish_reason"] == "tool_calls":
            (call,) = choice["message"]["tool_calls"]
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
            whole += 1
    assert whole > 0


@pytest.mark.parametrize("schema", [True, {}, {"$ref": "#/$defs/none"}, {"$ref": 5}])
@pytest.mark.parametrize("model", FORMS)
def test_an_argument_may_have_any_schema(client, model, schema):
    assert called(client, schema, model=model, max_tokens=30).status_code in (200, 400)


@pytest.mark.parametrize("text", ["a\u2028b\x85c\u2029d", "\x0b\x0c\x1c\r\n", "é — “x”"])
def test_a_line_of_ollama_is_one_line_for_every_reader_of_text(client, text):
    body = {"messages": MESSAGES, "format": {"const": text}, "options": {"num_predict": 90}}
    response = client.post("/api/chat", json=body, buffered=True)
    lines = [json.loads(line) for line in response.get_data(as_text=True).splitlines()]
    assert json.loads("".join(line["message"]["content"] for line in lines)) == text
    assert lines[-1]["done"]
