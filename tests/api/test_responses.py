"""/v1/responses: items, events in their order, tools, forms, what is stored."""

from __future__ import annotations

import gc
import json

import httpx2
import jsonschema
import openai
import pytest

from tests import tokenizers
from tests.api.test_bodies import error
from tests.api.test_tools import MERGES, SCHEMA
from tests.api.tiny_app import running
from tests.serving.tools.templates import THINKING
from transformers_api.api.http.services import EXTENSION
from transformers_api.errors import EngineFailed
from transformers_api.serving.response_store import ResponseStore, StoredResponse

WEATHER = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
PATCH = {"type": "custom", "name": "apply_patch", "description": "free text"}
HOSTED = [{"type": "web_search"}, {"type": "namespace", "name": "x", "tools": []}]
FORM = {"format": {"type": "json_schema", "name": "n", "schema": {"const": {"a": 1}}}}
KEYS = {"created_at", "error", "id", "incomplete_details", "instructions", "metadata", "model"}
KEYS |= {"object", "output", "parallel_tool_calls", "status", "temperature", "text", "tool_choice"}
KEYS |= {
    "presence_penalty",
    "frequency_penalty",
    "tools",
    "top_p",
    "truncation",
    "usage",
    "user",
    "store",
    "reasoning",
    "background",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = {
        "plain": tokenizers.byte_level(merges=MERGES),
        "thinks": tokenizers.byte_level(
            merges=("<think>", "</think>"), chat_template=THINKING["prompt"]
        ),
    }
    with running(tmp_path_factory.mktemp("responses"), made) as app:
        yield app.test_client()


def ask(client, **fields):
    body = {"input": "Hi", "seed": 1, "temperature": 1.0, "max_output_tokens": 400, **fields}
    return client.post("/v1/responses", json=body)


def whole(response) -> dict:
    assert response.status_code == 200, response.json
    return response.json


def events_of(response) -> list[dict]:
    """The events of a stream, whose names, numbers and places are right."""
    assert response.status_code == 200, response.json
    events = []
    for frame in response.get_data(as_text=True).strip().split("\n\n"):
        if frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    response.close()
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def same(one, other):
    """The outputs without what is drawn anew: ids."""
    skipped = {"id", "call_id"}
    return [{k: v for k, v in item.items() if k not in skipped} for item in one] == [
        {k: v for k, v in item.items() if k not in skipped} for item in other
    ]


def test_a_text_is_answered_with_every_field_of_a_response(client):
    body = whole(ask(client, text=FORM))
    assert set(body) >= KEYS
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    (item,) = body["output"]
    assert item["type"] == "message"
    (part,) = item["content"]
    assert json.loads(part["text"]) == {"a": 1}
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_the_text_is_that_of_chat_completions(client):
    chat = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hi"}], "seed": 3, "max_tokens": 30},
    ).json
    body = whole(
        client.post("/v1/responses", json={"input": "Hi", "seed": 3, "max_output_tokens": 30})
    )
    assert body["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_events_come_in_their_order_and_make_the_same_response(client):
    events = events_of(ask(client, text=FORM, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    text = "".join(e["delta"] for e in events if e["type"].endswith("output_text.delta"))
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == text
    assert same(last["output"], whole(ask(client, text=FORM))["output"])
    assert {e["item_id"] for e in events if "item_id" in e} == {last["output"][0]["id"]}


def test_a_call_is_an_item_with_valid_arguments(client):
    fields = {"tools": [WEATHER, *HOSTED], "tool_choice": "required", "parallel_tool_calls": False}
    body = whole(ask(client, **fields))
    (call,) = body["output"]
    assert call["type"] == "function_call"
    jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
    assert body["tools"] == fields["tools"]
    events = events_of(ask(client, stream=True, **fields))
    done = next(e for e in events if e["type"] == "response.function_call_arguments.done")
    pieces = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(pieces) == done["arguments"] == call["arguments"]
    assert same(events[-1]["response"]["output"], body["output"])


def test_a_custom_tool_takes_free_text(client):
    fields = {"tools": [PATCH], "tool_choice": {"type": "custom", "name": "apply_patch"}}
    body = whole(ask(client, max_output_tokens=3000, **fields))
    if body["status"] == "completed":
        (call,) = body["output"]
        assert call["type"] == "custom_tool_call"
        assert isinstance(call["input"], str)
    events = events_of(ask(client, stream=True, max_output_tokens=3000, **fields))
    assert same(events[-1]["response"]["output"], body["output"])


def test_what_was_thought_is_an_item_of_its_own(client):
    fields = {
        "model": "thinks",
        "reasoning": {"max_tokens": 5},
        "text": FORM,
        "include": ["reasoning.encrypted_content"],
    }
    body = whole(ask(client, **fields))
    thought, message = body["output"]
    assert (thought["type"], message["type"]) == ("reasoning", "message")
    assert thought["content"][0]["type"] == "reasoning_text"
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == 6
    events = events_of(ask(client, stream=True, **fields))
    assert "response.reasoning_text.delta" in {e["type"] for e in events}
    assert same(events[-1]["response"]["output"], body["output"])
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": thought["encrypted_content"]}
    history = [{"role": "user", "content": "Hi"}, sealed, {"role": "assistant", "content": "x"}]
    assert ask(client, input=history, model="thinks", max_output_tokens=1).status_code == 200


def test_scores_come_where_they_are_included(client):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "text": FORM}
    part = whole(ask(client, **fields))["output"][0]["content"][0]
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    events = events_of(ask(client, stream=True, **fields))
    scores = [s for e in events if e["type"].endswith("text.delta") for s in e["logprobs"]]
    assert scores == part["logprobs"]


def test_an_answer_that_is_cut_off_is_incomplete(client):
    body = whole(ask(client, max_output_tokens=3))
    assert (body["status"], body["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    events = events_of(ask(client, max_output_tokens=3, stream=True))
    assert events[-1]["type"] == "response.incomplete"


def test_a_conversation_goes_on_from_a_stored_response(client):
    first = whole(ask(client, input="My name is Zed", text=FORM, instructions="Be brief"))
    again = whole(ask(client, input="And?", previous_response_id=first["id"], text=FORM))
    plain = whole(
        ask(
            client,
            input=[
                {"role": "user", "content": "My name is Zed"},
                {"role": "assistant", "content": first["output"][0]["content"][0]["text"]},
                {"role": "user", "content": "And?"},
            ],
            text=FORM,
        )
    )
    assert again["usage"]["input_tokens"] == plain["usage"]["input_tokens"]
    assert whole(client.get(f"/v1/responses/{first['id']}")) == first
    items = whole(client.get(f"/v1/responses/{first['id']}/input_items"))
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "My name is Zed"}]
    assert whole(client.delete(f"/v1/responses/{first['id']}"))["deleted"] is True
    error(client.get(f"/v1/responses/{first['id']}"), 404)
    refused = error(ask(client, previous_response_id=first["id"]), 400)
    assert (refused["code"], refused["param"]) == (
        "previous_response_not_found",
        "previous_response_id",
    )


def test_a_streamed_response_is_stored_at_its_end_unless_it_is_not_to_be(client):
    kept = events_of(ask(client, stream=True, text=FORM))[-1]["response"]["id"]
    assert client.get(f"/v1/responses/{kept}").status_code == 200
    dropped = whole(ask(client, store=False, text=FORM))["id"]
    assert client.get(f"/v1/responses/{dropped}").status_code == 404


def test_a_tool_loop_of_calls_and_results(client):
    called = whole(ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False))
    (call,) = called["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    items = [{"role": "user", "content": "Hi"}, call, result]
    stateless = whole(ask(client, input=items, tools=[WEATHER], text=FORM, tool_choice="none"))
    stored = whole(
        ask(
            client, input=[result], previous_response_id=called["id"], text=FORM, tool_choice="none"
        )
    )
    assert stateless["usage"]["input_tokens"] == stored["usage"]["input_tokens"]


def test_input_tokens_are_counted_without_an_answer(client):
    counted = whole(client.post("/v1/responses/input_tokens", json={"input": "Hi"}))
    body = whole(ask(client, max_output_tokens=1))
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": body["usage"]["input_tokens"],
    }


def test_the_oldest_turns_are_dropped_where_that_is_wanted(client):
    long = [{"role": "user", "content": f"{turn} " + "x" * 900} for turn in range(8)]
    refused = error(ask(client, input=long), 400)
    assert refused["code"] == "context_length_exceeded"
    body = whole(ask(client, input=long, truncation="auto", max_output_tokens=2))
    assert 2500 < body["usage"]["input_tokens"] < 4096


def test_an_error_in_the_middle_is_an_event_and_a_failed_response(client, monkeypatch):
    from transformers_api.serving.generation import Generation

    count = 0
    inner = Generation.__next__

    def fail(self):
        nonlocal count
        count += 1
        if count > 4:
            raise EngineFailed("The step failed")
        return inner(self)

    monkeypatch.setattr(Generation, "__next__", fail)
    events = events_of(ask(client, stream=True))
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "engine_failed"


RESULT = {"type": "function_call_output", "call_id": "a", "output": "x"}
MADE = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
BAD = [
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "nonsense"}]}, "input[0]"),
    ({"input": [RESULT]}, "input[0].call_id"),
    ({"input": [RESULT, MADE]}, "input[0].call_id"),
    ({"input": [MADE, RESULT | {"call_id": "b"}]}, "input[1].call_id"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "function", "name": "nope"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": 5}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"reasoning": {"max_tokens": "many"}}, "reasoning.max_tokens"),
    ({"metadata": {"a": 5}}, "metadata"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_a_wrong_field_is_a_400_that_names_it(client, fields, param):
    assert error(ask(client, **fields), 400)["param"] == param


def test_only_what_runs_in_the_background_can_be_cancelled(client):
    response_id = whole(ask(client, text=FORM))["id"]
    refused = error(client.post(f"/v1/responses/{response_id}/cancel"), 400)
    assert "background" in refused["message"]


def test_openais_sdk_creates_parses_and_streams(client):
    transport = httpx2.WSGITransport(client.application)
    http = httpx2.Client(transport=transport)
    with openai.OpenAI(base_url="http://t/v1", api_key="k", max_retries=0, http_client=http) as sdk:
        body = sdk.responses.create(model="plain", input="Hi", text=FORM, max_output_tokens=99)
        assert json.loads(body.output_text) == {"a": 1}
        with sdk.responses.stream(
            model="plain",
            input="Hi",
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=900,
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        jsonschema.validate(json.loads(final.output[0].arguments), SCHEMA)
        assert sdk.responses.retrieve(body.id).id == body.id
        assert len(sdk.responses.input_items.list(body.id).data) == 1


def stored(owner="a", text="x") -> StoredResponse:
    return StoredResponse(body={"t": text}, items=[], messages=[], owner=owner)


def test_the_store_is_bounded_by_bytes_number_and_age_and_knows_owners():
    now = [0.0]
    store = ResponseStore(300, most=3, most_age_s=10, clock=lambda: now[0])
    for name in "abcd":
        store.put(name, stored())
    assert store.get("a", "a") is None
    assert store.get("b", "b") is None
    assert store.get("b", "a") is not None
    store.put("large", stored(text="x" * 270))
    assert len(store) < 3
    store.put("too large", stored(text="x" * 301))
    assert store.get("too large", "a") is None
    assert not store.delete("large", "b")
    now[0] = 11
    assert store.get("large", "a") is None
    assert len(store) == 0


def test_the_parts_of_a_message_alone_are_what_a_user_says(client):
    parts = [{"type": "input_text", "text": "Say"}, {"type": "input_text", "text": " hello"}]
    alone = whole(ask(client, input=parts, max_output_tokens=20))
    message = [{"role": "user", "content": parts}]
    assert (
        alone["output"][0]["content"]
        == (whole(ask(client, input=message, max_output_tokens=20))["output"][0]["content"])
    )
    (item,) = whole(client.get(f"/v1/responses/{alone['id']}/input_items"))["data"]
    assert (item["type"], item["role"], item["content"]) == ("message", "user", parts)
    image = [*parts, {"type": "input_image", "image_url": "data:x"}]
    assert error(ask(client, input=image), 400)["param"] == "input[2]"


def test_penalties_are_those_of_a_chat_and_are_echoed(client):
    fields = {"presence_penalty": 1.5, "frequency_penalty": -0.5}
    answer = whole(ask(client, max_output_tokens=30, **fields))
    assert {name: answer[name] for name in fields} == fields
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, **fields}
    chat = client.post("/v1/chat/completions", json={"seed": 1, "temperature": 1.0, **body}).json
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_nothing_is_stored_where_the_setting_says_so(serve):
    for mib, is_kept in ((0, False), (1, True)):
        served = serve(responses_store_mb=mib)
        answer = served.client.post("/v1/responses", json={"input": "Hi"}).json
        again = served.client.get(f"/v1/responses/{answer['id']}")
        assert (answer["store"], again.status_code) == (is_kept, 200 if is_kept else 404)


def test_what_is_stored_takes_the_memory_that_is_counted():
    lists = [[[]] * 1000 for _ in range(10)]  # three bytes as JSON, more than fifty as a list
    store = ResponseStore(1 << 20, 60)
    store.put("a", StoredResponse(body={"x": lists}, items=[{"i": 1}], messages=[], owner="a"))
    lists.clear()
    stored_response = store.get("a", "a")
    assert stored_response is not None
    assert [len(row) for row in stored_response.body["x"]] == [1000] * 10
    assert not any(map(gc.is_tracked, gc.get_referents(*store._entries.values())))


def test_a_chain_of_responses_has_no_more_turns_than_one_input(client):
    turns = [{"role": "user", "content": ""}] * 4000
    fields = {"truncation": "auto", "max_output_tokens": 1}
    first = whole(ask(client, input=turns, **fields))
    response = ask(client, input=turns, previous_response_id=first["id"], **fields)
    assert response.status_code == 400
    assert error(response)["param"] == "previous_response_id"


def test_the_store_of_the_application_has_an_owner_for_each_client(client):
    store = client.application.extensions[EXTENSION].responses
    response_id = whole(ask(client, text=FORM))["id"]
    assert store.get(response_id, "127.0.0.1") is not None
    assert store.get(response_id, "key:other") is None
