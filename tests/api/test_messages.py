"""/v1/messages: blocks, events, tools, thinking, errors in Anthropic's words."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests import tokenizers
from tests.api.test_tools import MERGES, SCHEMA
from tests.api.tiny_app import running
from tests.serving.tools.templates import TEMPLATES, THINKING
from transformers_api.errors import ApiError, EngineFailed, Overloaded, Unavailable

WEATHER = {"name": "get_weather", "description": "d", "input_schema": SCHEMA}
HELLO = [{"role": "user", "content": "Hi"}]
FORM = {"format": {"type": "json_schema", "schema": {"const": {"a": 1}}}}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    made = {
        "plain": tokenizers.byte_level(merges=MERGES),
        "tools": tokenizers.byte_level(merges=MERGES, chat_template=TEMPLATES["tagged json"]),
        "thinks": tokenizers.byte_level(
            merges=("<think>", "</think>"), chat_template=THINKING["prompt"]
        ),
    }
    with running(tmp_path_factory.mktemp("messages"), made) as app:
        yield app


@pytest.fixture
def client(app):
    return app.test_client()


def ask(client, **fields):
    body = {"messages": HELLO, "max_tokens": 900, "temperature": 1, **fields}
    return client.post("/v1/messages?beta=true", json=body)


def whole(response) -> dict:
    assert response.status_code == 200, response.json
    assert response.headers["request-id"]
    return response.json


def refused(response, status: int, kind: str) -> str:
    assert response.status_code == status, response.json
    body = response.json
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert response.headers["request-id"] == body["request_id"]
    return body["error"]["message"]


def events_of(response) -> list[dict]:
    assert response.status_code == 200, response.json
    events = []
    for frame in response.get_data(as_text=True).strip().split("\n\n"):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    response.close()
    return [event for event in events if event["type"] != "ping"]


def test_a_message_has_blocks_a_reason_and_its_usage(client):
    body = whole(ask(client, output_config=FORM))
    assert (body["type"], body["role"], body["stop_reason"]) == ("message", "assistant", "end_turn")
    (block,) = body["content"]
    assert json.loads(block["text"]) == {"a": 1}
    usage = body["usage"]
    assert usage["output_tokens"] > 0
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] > 0


def test_events_come_in_their_order_and_make_the_message(client):
    events = events_of(ask(client, output_config=FORM, stream=True, temperature=0))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert json.loads(text) == {"a": 1}
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


@pytest.mark.parametrize("model", ["plain", "tools"])
def test_a_call_is_a_block_with_valid_input(client, model):
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    fields = {"model": model, "tools": [WEATHER, hosted], "tool_choice": choice}
    body = whole(ask(client, **fields))
    (block,) = body["content"]
    assert (block["type"], block["name"], body["stop_reason"]) == (
        "tool_use",
        "get_weather",
        "tool_use",
    )
    jsonschema.validate(block["input"], SCHEMA)
    events = events_of(ask(client, stream=True, **fields))
    start = next(e for e in events if e["type"] == "content_block_start")
    assert start["content_block"]["input"] == {}
    pieces = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]
    jsonschema.validate(json.loads("".join(pieces)), SCHEMA)
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_what_was_thought_is_a_block_with_a_signature(client):
    # greedy: a random thought may be empty, and then it is no block
    fields = {"model": "thinks", "output_config": FORM, "temperature": 0}
    fields["thinking"] = {"type": "enabled", "budget_tokens": 5}
    thought, text = whole(ask(client, **fields))["content"]
    assert (thought["type"], text["type"]) == ("thinking", "text")
    assert isinstance(thought["signature"], str)
    events = events_of(ask(client, stream=True, **fields))
    kinds = [e["delta"]["type"] for e in events if e["type"] == "content_block_delta"]
    assert kinds.count("signature_delta") == 1
    assert kinds[0] == "thinking_delta"
    assert "text_delta" in kinds
    fields["thinking"] = {"type": "disabled"}
    assert [block["type"] for block in whole(ask(client, **fields))["content"]] == ["text"]


def test_a_loop_of_calls_and_results_reaches_the_prompt(client):
    history = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "Let me look"},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True,
                 "content": [{"type": "text", "text": "storm"}]},
                {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]  # fmt: skip
    short = count(client, messages=HELLO)
    long = count(client, messages=history, tools=[WEATHER], model="tools")
    assert long > short
    assert ask(client, messages=history, tools=[WEATHER], max_tokens=2).status_code == 200


def count(client, **fields) -> int:
    response = client.post("/v1/messages/count_tokens", json=fields)
    return whole(response)["input_tokens"]


def test_the_count_is_that_of_the_answer(client):
    fields = {"system": [{"type": "text", "text": "Be brief"}], "messages": HELLO}
    usage = whole(ask(client, max_tokens=1, **fields))["usage"]
    assert count(client, **fields) == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_turns_of_one_role_are_one_and_a_late_system_turn_goes_to_the_user(client):
    parts = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert count(client, messages=parts) == count(
        client, messages=[{"role": "user", "content": "a\n\nb"}]
    )
    late = [*HELLO, {"role": "assistant", "content": "x"}, {"role": "system", "content": "s"}]
    late.append({"role": "user", "content": "u"})
    same = [*late[:2], {"role": "user", "content": "s\n\nu"}]
    assert count(client, messages=late) == count(client, messages=same)


def test_a_last_turn_of_the_assistant_is_gone_on_with(client):
    history = [*HELLO, {"role": "assistant", "content": '{"a":'}]
    body = whole(ask(client, messages=history, output_config=FORM))
    assert json.loads('{"a":' + body["content"][0]["text"]) == {"a": 1}


def test_a_stop_sequence_is_named(client):
    fields = {"output_config": FORM, "stop_sequences": ['"a"']}
    body = whole(ask(client, **fields))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", '"a"')
    assert events_of(ask(client, stream=True, **fields))[-2]["delta"] == {
        "stop_reason": "stop_sequence",
        "stop_sequence": '"a"',
    }
    short = whole(ask(client, output_config=FORM, max_tokens=2))  # which is too few for the form
    assert short["stop_reason"] == "max_tokens"


RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
MADE = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
}
BAD = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "user", "content": [RESULT]}, MADE]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [*HELLO, MADE, {"role": "user", "content": [RESULT | {"tool_use_id": "b"}]}]},
     "messages[2].content[0].tool_use_id"),
    ({"system": 5}, "system"),
    ({"tools": [{"name": "a b"}]}, "tools[0].name"),
    ({"tools": [{"name": "a", "input_schema": []}]}, "tools[0].input_schema"),
    ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
    ({"thinking": {"type": "deep"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking.budget_tokens"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"temperature": 1.5}, "temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "name"), BAD)
def test_a_wrong_field_is_named_in_the_message(client, fields, name):
    assert f"'{name}'" in refused(ask(client, **fields), 400, "invalid_request_error")


def test_a_prompt_that_is_too_long_says_so_in_the_words_that_agents_look_for(client):
    response = ask(client, messages=[{"role": "user", "content": "x" * 9000}])
    message = refused(response, 400, "invalid_request_error")
    assert message.startswith("prompt is too long: ")
    assert " tokens > 4096 maximum" in message


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after=2), 429, "rate_limit_error"),
        (Unavailable("later"), 529, "overloaded_error"),
        (EngineFailed("broken"), 500, "api_error"),
    ],
)
def test_errors_have_their_status_and_type(app, client, monkeypatch, error: ApiError, status, kind):
    from transformers_api.api.http.services import EXTENSION

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(app.extensions[EXTENSION].registry, "resolve", fail)
    refused(ask(client), status, kind)
    monkeypatch.undo()
    refused(client.post("/v1/messages/nowhere"), 404, "not_found_error")


def test_an_error_in_the_middle_is_the_last_event(client, monkeypatch):
    from transformers_api.serving.generation import Generation

    def fail(_self):
        raise EngineFailed("The step failed")

    monkeypatch.setattr(Generation, "__next__", fail)
    events = events_of(ask(client, stream=True))
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"


def test_a_head_of_the_root_is_answered(client):
    assert client.head("/").status_code == 200


def test_models_are_listed_in_both_worlds_words(client):
    body = client.get("/v1/models").json
    assert (body["first_id"], body["has_more"]) == (body["data"][0]["id"], False)
    assert body["last_id"] == body["data"][-1]["id"]
    model = body["data"][0]
    assert (model["type"], model["display_name"]) == ("model", model["id"])
    assert model["created_at"].endswith("Z")


def test_anthropics_sdk_creates_and_streams(app):
    anthropic = pytest.importorskip("anthropic")
    httpx = pytest.importorskip("httpx2")
    with anthropic.Anthropic(
        base_url="http://testserver",
        api_key="none",
        max_retries=0,
        http_client=httpx.Client(transport=httpx.WSGITransport(app=app)),
    ) as sdk:
        message = sdk.messages.create(
            model="plain", messages=HELLO, max_tokens=99, extra_body={"output_config": FORM}
        )
        assert json.loads(message.content[0].text) == {"a": 1}
        with sdk.messages.stream(
            model="tools",
            messages=HELLO,
            max_tokens=900,
            tools=[WEATHER],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
        ) as stream:
            final = stream.get_final_message()
        jsonschema.validate(final.content[0].input, SCHEMA)
        assert sdk.messages.count_tokens(model="plain", messages=HELLO).input_tokens > 0
        with pytest.raises(anthropic.BadRequestError):
            sdk.messages.create(model="plain", messages=[], max_tokens=1)


@pytest.mark.parametrize(
    "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}, {}]
)
@pytest.mark.parametrize("route", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_thread_is_refused_so_that_clients_send_all(client, route, thread):
    body = {"messages": HELLO, "max_tokens": 9, "thread": thread}
    response = client.post(route, json=body)
    assert "'thread'" in refused(response, 400, "invalid_request_error")
    details = response.json["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_no_thread_is_no_reason(client):
    assert whole(ask(client, thread=None, output_config=FORM))["stop_reason"] == "end_turn"
