"""Tool calls over chat completions: any model, any template, always valid arguments."""

from __future__ import annotations

import json
import re

import jsonschema
import openai
import pytest

from tests import tokenizers
from tests.api.conftest import events
from tests.api.test_bodies import error
from tests.api.tiny_app import running
from tests.serving.tools.templates import TEMPLATES

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA},
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
MESSAGES = [{"role": "user", "content": "Weather?"}]
FORMS = ["plain", *TEMPLATES]
MERGES = ('{"', '":', "</", ">\n", "name", "get_weather")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = {
        name.replace(" ", "-"): tokenizers.byte_level(
            merges=MERGES, chat_template=TEMPLATES.get(name, tokenizers.CHATML)
        )
        for name in FORMS
    }
    with running(tmp_path_factory.mktemp("tools"), made) as app:
        yield app.test_client()


def chat(client, **fields):
    body = {
        "messages": MESSAGES,
        "tools": TOOLS,
        "temperature": 1.0,
        "seed": 1,
        "max_tokens": 900,
        **fields,
    }
    return client.post("/v1/chat/completions", json=body)


def message(response):
    assert response.status_code == 200, response.json
    return response.json["choices"][0]["message"]


def checked(calls) -> list[tuple[str, dict]]:
    read = []
    for call in calls:
        assert call["type"] == "function"
        assert len(call["id"]) == len("call_") + 24
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        if name == "get_weather":
            jsonschema.validate(arguments, SCHEMA)
        else:
            assert (name, arguments) == ("now", {})
        read.append((name, arguments))
    return read


@pytest.mark.parametrize("form", FORMS)
def test_a_required_call_is_made_with_valid_arguments_by_any_model(client, form):
    fields = {"model": form.replace(" ", "-"), "tool_choice": "required", "seed": 3}
    whole = chat(client, **fields)
    answer = message(whole)
    assert answer["content"] is None
    calls = checked(answer["tool_calls"])
    assert calls
    assert whole.json["choices"][0]["finish_reason"] == "tool_calls"
    streamed = events(chat(client, stream=True, **fields))
    assert streamed.done
    assert streamed.reasons() == [(0, "tool_calls")]
    assert checked(joined(streamed)) == calls


@pytest.mark.parametrize("max_tokens", [3, 9, 14, 60])
def test_a_stream_that_is_cut_has_the_scores_and_the_calls_of_the_whole_answer(client, max_tokens):
    fields = {"max_tokens": max_tokens, "tool_choice": "required", "logprobs": True, "n": 2}
    whole, streamed = chat(client, **fields).json, events(chat(client, stream=True, **fields))
    scores, calls = [[], []], [[], []]
    for choice in (choice for payload in streamed.payloads for choice in payload["choices"]):
        scores[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
        calls[choice["index"]] += choice["delta"].get("tool_calls", ())
    for choice in whole["choices"]:
        assert scores[choice["index"]] == choice["logprobs"]["content"]
        assert bool(calls[choice["index"]]) is bool(choice["message"].get("tool_calls"))


def joined(streamed) -> list[dict]:
    """The calls of a stream, put together as an SDK does."""
    calls: dict[int, dict] = {}
    for payload in streamed.payloads:
        for choice in payload["choices"]:
            for piece in choice["delta"].get("tool_calls", ()):
                if "id" in piece:
                    calls[piece["index"]] = {**piece, "function": dict(piece["function"])}
                else:
                    arguments = piece["function"]["arguments"]
                    calls[piece["index"]]["function"]["arguments"] += arguments
    return [calls[index] for index in sorted(calls)]


def test_a_named_tool_is_the_one_that_is_called(client):
    choice = {"type": "function", "function": {"name": "now"}}
    assert checked(message(chat(client, tool_choice=choice))["tool_calls"]) == [("now", {})]
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [NOW]},
    }
    calls = checked(message(chat(client, tool_choice=allowed))["tool_calls"])
    assert {name for name, _ in calls} == {"now"}


def test_one_call_only_where_parallel_ones_are_not_wanted(client):
    for seed in range(5):
        fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        assert len(checked(message(chat(client, **fields))["tool_calls"])) == 1


def test_a_free_answer_has_the_tokens_that_it_would_have_had(client):
    fields = {"max_tokens": 40, "return_token_ids": True}
    auto = chat(client, **fields).json["choices"][0]
    prompt = auto["prompt_token_ids"]
    body = {"prompt": prompt, "temperature": 1.0, "seed": 1, "max_tokens": 40, "top_p": 0.9}
    free = client.post("/v1/completions", json=body | {"return_token_ids": True}).json
    assert auto["token_ids"] == free["choices"][0]["token_ids"]
    assert "tool_calls" not in auto["message"]


def test_none_hides_the_tools_and_reads_no_calls(client):
    without = client.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 5, "seed": 1}
    ).json
    hidden = chat(client, tool_choice="none", max_tokens=5, temperature=0.7).json
    assert hidden["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]
    assert hidden["choices"][0]["message"] == without["choices"][0]["message"]


@pytest.mark.parametrize("form", FORMS)
def test_a_history_with_calls_and_results_stands_in_the_prompt(client, form):
    call = {
        "id": "call_0123456789abcdef01234567",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Lisbon", "days": 3}'},
    }
    history = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]
    body = {"messages": history, "tools": TOOLS, "model": form.replace(" ", "-"), "max_tokens": 1}
    answer = client.post("/v1/chat/completions", json=body | {"return_token_ids": True}).json
    text = bytes(t for t in answer["choices"][0]["prompt_token_ids"] if t < 256).decode()
    assert "Lisbon" in text
    assert "sunny" in text


def test_broken_arguments_of_another_server_stop_nobody(client):
    call = {"id": "x", "function": {"name": "now", "arguments": '{"broken'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "12:00"},
    ]
    for form in FORMS:
        response = chat(client, model=form.replace(" ", "-"), messages=history, max_tokens=2)
        assert response.status_code == 200, response.json


def test_a_format_and_tools_go_together(client):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": {"a": 1}}}}
    seen = set()
    for seed in range(12):
        answer = message(chat(client, response_format=form, seed=seed))
        if answer.get("tool_calls"):
            checked(answer["tool_calls"])
            seen.add("call")
        else:
            assert json.loads(answer["content"]) == {"a": 1}
            seen.add("content")
    assert seen == {"call", "content"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("form", ["plain", "xml", "named"])
def test_a_call_that_is_cut_before_its_name_is_no_content(client, form, most, stream):
    fields = {"model": form, "tool_choice": "required", "max_tokens": most, "stream": stream}
    response = chat(client, **fields)
    if stream:
        assert events(response).text() == ""
        return
    (choice,) = response.json["choices"]
    assert choice["finish_reason"] == "length"
    assert not choice["message"]["content"]


TAG = {"begin": "<f=x>", "schema": {"const": {"a": 1}}, "end": "</f>"}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"grammar": 'root ::= "y" [0-9]{2}'}, r"y\d\d"),
        ({"grammar": "start: WORD\nWORD: /y[0-9]{2}/"}, r"y\d\d"),
        ({"structured_outputs": {"regex": "y[0-9]{2}"}}, r"y\d\d"),
        ({"structured_outputs": {"choice": ["y", "y</x"]}}, r"y|y</x"),
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
    ],
)
def test_every_form_goes_together_with_tools(client, form, pattern):
    seen = set()
    for seed in range(12):
        answer = message(chat(client, seed=seed, **form))
        if answer.get("tool_calls"):
            checked(answer["tool_calls"])
            seen.add("call")
        else:
            assert re.fullmatch(pattern, answer["content"], re.DOTALL), answer["content"]
            seen.add("content")
    assert seen == {"call", "content"}


def test_tags_go_together_with_tools(client):
    form = {"type": "structural_tag", "structures": [TAG], "triggers": ["<f"]}
    for seed in range(4):
        answer = message(chat(client, seed=seed, max_tokens=60, response_format=form))
        checked(answer.get("tool_calls") or ())


def test_a_form_that_is_wrong_is_named_beside_tools(client):
    for form, param in (
        ({"grammar": "start: nothing"}, "grammar"),
        ({"guided_regex": "(?=a)"}, "guided_regex"),
    ):
        assert error(chat(client, **form), 400)["param"] == param


def test_a_history_in_the_older_words_is_that_of_calls_and_results(client):
    function = {"name": "now", "arguments": "{}"}
    older = [
        *MESSAGES,
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "now", "content": "noon"},
    ]
    newer = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    for model in ("plain", "xml"):
        fields = {"model": model, "max_tokens": 1, "return_token_ids": True}
        prompts = [
            chat(client, messages=messages, **fields).json["choices"][0]["prompt_token_ids"]
            for messages in (older, newer)
        ]
        assert prompts[0] == prompts[1]
    unknown = error(chat(client, messages=[*MESSAGES, older[-1]]), 400)
    assert unknown["param"] == "messages[1].tool_call_id"
    assert error(chat(client, messages=[{"role": "function", "content": "x"}]), 400)["param"] == (
        "messages[0].name"
    )


def test_the_older_functions_are_answered_in_their_own_words(client):
    body = {
        "messages": MESSAGES,
        "functions": [WEATHER["function"]],
        "function_call": {"name": "get_weather"},
        "temperature": 1,
        "seed": 5,
    }
    answer = client.post("/v1/chat/completions", json=body).json["choices"][0]
    assert answer["finish_reason"] == "function_call"
    called = answer["message"]["function_call"]
    jsonschema.validate(json.loads(called["arguments"]), SCHEMA)
    streamed = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    deltas = [p["choices"][0]["delta"] for p in streamed.payloads]
    pieces = [d["function_call"]["arguments"] for d in deltas if "function_call" in d]
    assert "".join(pieces) == called["arguments"]


def test_several_answers_have_calls_each(client):
    answer = chat(client, tool_choice="required", n=3).json
    calls = [checked(choice["message"]["tool_calls"]) for choice in answer["choices"]]
    assert len(calls) == 3


def test_a_call_that_is_cut_off_says_so(client):
    fields = {"tool_choice": "required", "max_tokens": 20}
    choice = chat(client, **fields).json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert events(chat(client, stream=True, **fields)).reasons() == [(0, "length")]


def bad_tool(**function):
    return [{"type": "function", "function": {"name": "f", **function}}]


BAD = [
    ({"tools": {}}, "tools"),
    ({"tools": [NOW] * 129}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": bad_tool(name="a b")}, "tools[0].function.name"),
    ({"tools": bad_tool(name="x" * 65)}, "tools[0].function.name"),
    ({"tools": bad_tool(description=5)}, "tools[0].function.description"),
    ({"tools": bad_tool(strict="yes")}, "tools[0].function.strict"),
    ({"tools": bad_tool(parameters=True)}, "tools[0].function.parameters"),
    ({"tools": bad_tool(parameters=[])}, "tools[0].function.parameters"),
    ({"tools": bad_tool(parameters={"type": "array"})}, "tools[0].function.parameters"),
    ({"tools": [NOW, NOW]}, "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "tool_choice"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages[0].tool_call_id",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "now", "arguments": "{}"}}]},
                {"role": "tool", "content": "x", "tool_call_id": "b"},
            ]
        },
        "messages[1].tool_call_id",
    ),
    ({"messages": [*MESSAGES, {"role": "tool", "content": "x", "tool_call_id": "b"}]}, "messages[1].tool_call_id"),
    (
        {
            "messages": [
                {"role": "tool", "content": "x", "tool_call_id": "a"},
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "now", "arguments": "{}"}}]},
            ]
        },
        "messages[0].tool_call_id",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_a_wrong_tool_is_a_400_that_names_the_field(client, fields, param):
    assert error(chat(client, **fields), 400)["param"] == param


def test_openais_sdk_parses_the_calls_of_a_stream(client):
    import httpx2

    transport = httpx2.WSGITransport(client.application)
    with (
        openai.OpenAI(
            base_url="http://testserver/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
        ) as sdk,
        sdk.chat.completions.stream(
            model="plain",
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            seed=2,
            max_tokens=900,
        ) as stream,
    ):
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (first, *_) = final.choices[0].message.tool_calls
    assert first.function.name in ("get_weather", "now")
    json.loads(first.function.arguments)
