"""What /metrics and the log say of forms, calls, thoughts and stored responses."""

from __future__ import annotations

import pytest

from tests import tokenizers
from tests.api.test_tools import MESSAGES, TOOLS
from tests.api.tiny_app import running
from tests.metrics_app import lines_of, logged, scrape
from tests.serving.tools.templates import TEMPLATES

OURS = "transformers_api_"
SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = {
        "plain": tokenizers.byte_level(merges=('{"',), chat_template=tokenizers.CHATML),
        "thinking": tokenizers.byte_level(
            merges=("<think>", "</think>"), chat_template=TEMPLATES["thinking and tagged json"]
        ),
    }
    with running(tmp_path_factory.mktemp("counted"), made) as app:
        yield app.test_client()


@pytest.fixture
def grown(client):
    """Ask, and get what has grown of our metrics meanwhile."""

    def ask(route, status=200, **body):
        before = scrape(client)
        with logged() as text:
            answer = client.post(route, json={"seed": 1, "temperature": 1.0, **body})
            answer.get_data()
            answer.close()
        assert answer.status_code == status, answer.get_data(as_text=True)
        after = scrape(client)
        shown = {name: value - before.get(name, 0) for name, value in after.items()}
        (line,) = lines_of(text, "request")
        return {name: value for name, value in shown.items() if value}, line

    return ask


def chat(grown, model="plain", **fields):
    body = {"model": model, "messages": MESSAGES, "max_tokens": 700, **fields}
    return grown("/v1/chat/completions", **body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_is_compiled_once_and_its_masks_are_waited_for(grown, stream):
    schema = {**SCHEMA, "title": f"of {stream}"}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    first, line = chat(grown, response_format=form, stream=stream)
    assert first[f"{OURS}constraint_compile_seconds_count"] == 1
    assert first[f"{OURS}constraint_compile_seconds_sum"] > 0
    assert first[f"{OURS}constraint_wait_seconds_count"] == line["completion_tokens"]
    again, _ = chat(grown, response_format=form, stream=stream)
    assert f"{OURS}constraint_compile_seconds_count" not in again


def test_plain_answers_wait_for_no_mask(grown):
    shown, line = chat(grown, max_tokens=3)
    assert not [name for name in shown if "constraint" in name or "tool_calls" in name]
    assert "tool_calls" not in line


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("model", "form"), [("plain", "own"), ("thinking", "derived")])
def test_calls_are_counted_by_choice_and_format(grown, model, form, stream):
    fields = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "thinking_budget_tokens": 5,
    }
    shown, line = chat(grown, model, stream=stream, **fields)
    name = f"{OURS}tool_calls_total{{choice=required,format={form},model_name={model}}}"
    assert shown[name] == 1
    assert line["tool_calls"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_thoughts_are_counted(grown, stream):
    fields = {"thinking_budget_tokens": 5, "response_format": {"type": "json_object"}}
    shown, line = chat(grown, "thinking", stream=stream, max_tokens=40, **fields)
    thought = shown.get(f"{OURS}reasoning_tokens_total{{model_name=thinking}}", 0)
    assert thought == line.get("reasoning_tokens", 0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "refused"),
        ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 1}}, "refused"),
        ({"json_schema": {"enum": list(range(30_000))}}, "refused"),
    ],
)
def test_forms_that_cannot_be_are_counted(grown, fields, reason):
    shown, _ = chat(grown, status=400, **fields)
    assert shown[f"{OURS}constraint_failures_total{{reason={reason}}}"] == 1


def test_stored_responses_are_shown_with_their_bytes(grown, client):
    body = {"input": "Hi", "max_output_tokens": 2, "model": "plain"}
    client.post("/v1/responses", json=body)
    assert scrape(client)[f"{OURS}responses_stored"] >= 1
    shown, _ = grown("/v1/responses", **body)
    assert shown[f"{OURS}responses_stored"] == 1
    assert shown[f"{OURS}responses_stored_bytes"] > 100
