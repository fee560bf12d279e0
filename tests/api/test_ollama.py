"""Ollama's API: lines of JSON, calls as objects, forms, what there is."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests import tokenizers
from tests.api.test_tools import MERGES, SCHEMA
from tests.api.tiny_app import running
from tests.fakes import FakeEngine, say
from tests.serving.tools.templates import TEMPLATES, THINKING

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
HELLO = [{"role": "user", "content": "Hi"}]
OPTIONS = {"seed": 1, "temperature": 1.0, "num_predict": 300}
CONST = {"const": {"a": 1}}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = {
        "plain": tokenizers.byte_level(merges=MERGES),
        "tools": tokenizers.byte_level(merges=MERGES, chat_template=TEMPLATES["tagged json"]),
        "thinks": tokenizers.byte_level(
            merges=("<think>", "</think>"), chat_template=THINKING["prompt"]
        ),
    }
    with running(tmp_path_factory.mktemp("ollama"), made) as app:
        yield app.test_client()


def post(client, route, **fields):
    return client.post(f"/api/{route}", json={"options": OPTIONS, **fields})


def lines(response) -> list[dict]:
    assert response.status_code == 200, response.json
    assert response.content_type == "application/x-ndjson"
    read = [json.loads(line) for line in response.get_data(as_text=True).splitlines()]
    response.close()
    assert [line["done"] for line in read] == [False] * (len(read) - 1) + [True]
    return read


def whole(response) -> dict:
    assert response.status_code == 200, response.json
    return response.json


def test_a_chat_streams_unless_it_is_told_not_to(client):
    streamed = lines(post(client, "chat", messages=HELLO, format=CONST))
    text = "".join(line["message"]["content"] for line in streamed)
    assert json.loads(text) == {"a": 1}
    last = streamed[-1]
    assert (last["done_reason"], last["eval_count"] > 0) == ("stop", True)
    body = whole(post(client, "chat", messages=HELLO, format=CONST, stream=False))
    assert body["message"] == {"role": "assistant", "content": text}
    assert body["prompt_eval_count"] == last["prompt_eval_count"]


def test_a_prompt_is_answered_through_the_template_or_raw(client):
    streamed = lines(post(client, "generate", prompt="Hi", format=CONST))
    assert json.loads("".join(line["response"] for line in streamed)) == {"a": 1}
    chat = whole(post(client, "chat", messages=HELLO, stream=False))
    shaped = whole(post(client, "generate", prompt="Hi", stream=False))
    assert shaped["response"] == chat["message"]["content"]
    raw = whole(post(client, "generate", prompt="Hi", raw=True, stream=False))
    assert raw["prompt_eval_count"] == 2


def test_json_is_an_object(client):
    for seed in range(5):
        options = OPTIONS | {"seed": seed}
        body = whole(
            post(client, "chat", messages=HELLO, format="json", stream=False, options=options)
        )
        if body["done_reason"] == "stop":
            assert isinstance(json.loads(body["message"]["content"]), dict)


CALLED = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_one_object(serve, stream):
    app = serve(FakeEngine(say("Let me see. " + CALLED)))
    response = post(app.client, "chat", messages=HELLO, tools=[WEATHER], stream=stream)
    messages = [line["message"] for line in (lines(response) if stream else [whole(response)])]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    arguments = {"city": "Rome", "days": 2}
    assert calls == [{"function": {"name": "get_weather", "arguments": arguments}}]
    jsonschema.validate(arguments, SCHEMA)
    assert "".join(message["content"] for message in messages) == "Let me see."


def test_calls_and_results_of_a_history_reach_the_prompt(client):
    history = [
        *HELLO,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "tool_name": "get_weather", "content": "sunny"},
    ]
    fields = {"messages": history, "tools": [WEATHER], "stream": False}
    short = whole(post(client, "chat", model="tools", messages=HELLO, stream=False))
    long = whole(post(client, "chat", model="tools", **fields))
    assert long["prompt_eval_count"] > short["prompt_eval_count"] + 100


def test_thinking_has_a_field_of_its_own(client):
    fields = {"model": "thinks:latest", "messages": HELLO, "options": OPTIONS | {"num_predict": 9}}
    streamed = lines(post(client, "chat", **fields))
    assert "".join(line["message"].get("thinking", "") for line in streamed)
    assert not "".join(line["message"]["content"] for line in streamed)
    assert streamed[-1]["done_reason"] == "length"
    answered = whole(post(client, "chat", think=False, format=CONST, stream=False, model="thinks",
                          messages=HELLO))  # fmt: skip
    assert json.loads(answered["message"]["content"]) == {"a": 1}


def test_nothing_asked_loads_the_model(client):
    body = whole(post(client, "generate", model="tools"))
    assert (body["done"], body["done_reason"], body["response"]) == (True, "load", "")
    assert whole(post(client, "chat", model="tools"))["message"]["content"] == ""
    assert whole(client.get("/api/ps"))["models"][0]["name"] == "tools"


def test_what_there_is_is_listed_and_shown(client):
    assert whole(client.get("/api/version"))["version"]
    names = [model["model"] for model in whole(client.get("/api/tags"))["models"]]
    assert names == ["plain", "tools", "thinks"]
    assert "completion" in whole(post(client, "show", model="plain"))["capabilities"]


def test_what_is_not_offered_says_so(client):
    for action in ("pull", "push", "create", "copy"):
        response = post(client, action, model="x")
        assert response.status_code == 501
        assert action in response.json["error"]
    assert client.delete("/api/delete", json={"model": "x"}).status_code == 501
    assert post(client, "embed", model="x", input="y").status_code == 501
    assert post(client, "embeddings", model="x", prompt="y").status_code == 501


BAD = [
    ("chat", {"messages": [{"role": "robot"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, "Images"),
    ("chat", {"messages": [*HELLO, {"role": "tool", "content": "x", "tool_call_id": "a"}]},
     "messages[1].tool_call_id"),
    ("chat", {"messages": HELLO, "format": 5}, "format"),
    ("chat", {"messages": HELLO, "think": "deep"}, "think"),
    ("chat", {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
    ("chat", {"messages": HELLO, "options": {"temperature": "hot"}}, "options.temperature"),
    ("chat", {"messages": HELLO, "options": {"mirostat": 1}}, "options.mirostat"),
    ("generate", {"prompt": 5}, "prompt"),
    ("generate", {"prompt": "x", "images": ["a"]}, "images"),
    ("show", {}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "fields", "name"), BAD)
def test_a_wrong_field_is_a_400_that_names_it(client, route, fields, name):
    response = post(client, route, **fields)
    assert response.status_code == 400, response.json
    assert set(response.json) == {"error"}
    assert name in response.json["error"]


def test_an_unknown_model_is_a_404(client):
    assert post(client, "chat", model="none", messages=HELLO).status_code == 404
    assert client.get("/api/nowhere").json.keys() == {"error"}
