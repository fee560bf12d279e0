"""``intervene`` on every route that writes, with a real engine: what it does, says and refuses."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy
import pytest
from marshmallow import ValidationError

from tests import tokenizers
from tests.api.tiny_app import running
from tests.fakes import fake_model
from transformers_api.api.http.services import EXTENSION
from transformers_api.api.openai.schemas.embeddings import EmbeddingRequest
from transformers_api.api.openai.schemas.rerank import RerankRequest
from transformers_api.errors import InvalidRequest
from transformers_api.serving.inspect.edit_request import (
    EditRequest,
    InterveneRequest,
    check_size,
)

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
WIDTH, LAYERS = 32, 2
VECTOR = [(-1) ** i * 3.0 for i in range(WIDTH)]
ADD = {"do": "add", "vector": VECTOR, "layers": [0]}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    with running(folder, dict.fromkeys(["tiny", "twin"], tokenizers.byte_level())) as app:
        yield app


@pytest.fixture
def client(app):
    return app.test_client()


def completion(client, *edits, status=200, **fields):
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    if edits:
        body["intervene"] = {"edits": list(edits)}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == status, response.get_data(as_text=True)
    return response.get_json() if not fields.get("stream") else events(response)


def chat(client, *edits, status=200, **fields):
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    if edits:
        body["intervene"] = {"edits": list(edits)}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.get_data(as_text=True)
    return response.get_json() if not fields.get("stream") else events(response)


def events(response):
    lines = response.get_data(as_text=True).splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return [json.loads(each) for each in data]


def text(answer):
    return answer["choices"][0]["text"]


def refusal(client, *edits, **fields):
    return completion(client, *edits, status=400, **fields)["error"]


def test_an_edit_changes_the_answer_and_the_answer_says_what_was_done(client):
    plain, edited = completion(client), completion(client, ADD)
    assert text(plain) != text(edited)
    assert "intervene" not in plain["usage"]
    usage = edited["usage"]["intervene"]
    assert usage.pop("ms") > 0
    tokens = len(PROMPT) + 6 - 1
    assert usage == {"edits": 1, "rows": 1, "places": 1, "tokens": tokens}
    assert edited["choices"][0]["intervene"] == {
        "edits": [{"do": "add", "part": "resid", "layers": [0], "at": [[0, None]], "elided": False}]
    }
    assert text(completion(client)) == text(plain)


@pytest.mark.parametrize(
    "edit",
    [
        {**ADD, "scale": 0},
        {**ADD, "vector": [0.0] * WIDTH},
        {"do": "scale", "part": "mlp", "layers": "all", "by": 1},
        {"do": "erase", "vector": [0.0] * WIDTH, "layers": "all"},
        {"do": "temper", "layers": "all", "temperature": 1},
        {"do": "block", "layers": "all", "keys": []},
        {"do": "block", "layer": 0, "queries": "prompt", "keys": "generated"},
    ],
)
def test_off_is_off_to_the_bit(client, edit):
    plain, off = (completion(client, *own, logprobs=3) for own in ((), (edit,)))
    assert off["choices"][0]["logprobs"] == plain["choices"][0]["logprobs"]
    assert off["choices"][0]["intervene"]["edits"][0]["elided"] is True
    assert off["usage"]["intervene"] == {"edits": 0, "rows": 0, "places": 0, "tokens": 0, "ms": 0}


EDITS = {
    "add in units of the norm": {**ADD, "units": "norm", "scale": 2},
    "add, as long as before": {**ADD, "scale": 8, "keep_norm": True},
    "erase": {"do": "erase", "vector": VECTOR, "layers": "all"},
    "erase several": {"do": "erase", "vector": [VECTOR, list(range(WIDTH))], "layer": 1},
    "no attention": {"do": "ablate", "part": "attn", "layer": 0},
    "the mean": {"do": "ablate", "part": "mlp", "layer": 1, "with": "mean"},
    "heads": {"do": "ablate", "part": "head", "layer": 0, "heads": [1, 3]},
    "mean heads": {"do": "ablate", "part": "head", "layer": 0, "heads": [1], "with": "mean"},
    "all heads": {"do": "scale", "part": "head", "layers": "all", "heads": "all", "by": 0.1},
    "neurons": {"do": "set", "part": "neuron", "layer": 1, "neurons": [5, 9], "value": 50},
    "add to neurons": {"do": "add", "part": "neuron", "layer": 0, "neurons": "all", "value": 9},
    "the embedding": {**ADD, "layers": [-1]},
    "a range": {"do": "scale", "part": "mlp", "range": [0, 1], "by": -1},
    "a part of the text": {**ADD, "at": {"text": "France"}},
    "the answer": {**ADD, "at": "generated"},
    "some steps": {**ADD, "at": {"steps": [1, 3]}},
    "places": {**ADD, "at": [0, -1, 26]},
    "no edge": {"do": "block", "layers": "all", "queries": "last", "keys": {"text": "France"}},
    "one head's edges": {"do": "block", "layer": 0, "heads": [2], "keys": [0, 3]},
    "hot heads": {"do": "temper", "range": [0, 1], "heads": [0, 1], "temperature": 30},
    "cold answers": {"do": "temper", "layer": 0, "temperature": 0.01, "at": "generated"},
    "queries": {"do": "scale", "part": "q", "layer": 0, "by": 20},
    "keys of a head": {
        "do": "add",
        "part": "k",
        "layer": 0,
        "heads": [1],
        "vector": [99] * 8,
        "at": {"text": "France"},
    },
    "values": {"do": "set", "part": "v", "layers": "all", "value": 3, "at": {"text": "France"}},
    "no values": {"do": "ablate", "part": "v", "layer": 1, "heads": [0]},
    "mean keys": {"do": "ablate", "part": "k", "layers": "all", "with": "mean"},
    "values of another prompt": {
        "do": "ablate",
        "part": "v",
        "layer": 0,
        "with": {"prompt": "The capital of Poland is"},
        "at": {"text": "France"},
    },
    "another prompt": {
        "do": "ablate",
        "layer": 0,
        "with": {"prompt": "The capital of Poland is"},
        "at": {"text": "France"},
    },
}


WHOLE_TRACE = {
    "layers": [0, 1],
    "resid_norms": True,
    "lens": {"layers": "all"},
    "parts": {"by": "head"},
    "uncertainty": True,
    "activations": [{"part": "q", "layer": 0}, {"part": "head", "layers": "all"}],
}


@pytest.mark.parametrize("name", EDITS)
def test_each_kind_of_edit_does_something_and_the_same_again(client, name):
    answers = [completion(client, *own, logprobs=2) for own in ((), (EDITS[name],), (EDITS[name],))]
    answers.append(completion(client, EDITS[name], logprobs=2, trace=WHOLE_TRACE))
    plain, once, twice, traced = (answer["choices"][0]["logprobs"] for answer in answers)
    assert once != plain
    assert once == twice == traced
    assert answers[1]["usage"]["intervene"]["tokens"] > 0


@pytest.mark.parametrize(
    ("at", "ranges"),
    [
        ("prompt", [[0, 24]]),
        ("generated", [[24, None]]),
        ("last", [[23, 24]]),
        ([3, -1, 4], [[3, 5], [23, 24]]),
        ({"steps": [0, 2]}, [[23, 25]]),
        ({"text": "a", "nth": 1}, [[9, 10]]),
    ],
)
def test_the_plan_says_which_positions_it_means(client, at, ranges):
    (said,) = completion(client, {**ADD, "at": at})["choices"][0]["intervene"]["edits"]
    assert said["at"] == ranges


def test_blocked_edges_are_told_as_positions(client):
    edits = EDITS["no edge"], {"do": "temper", "layer": 1, "heads": [3], "temperature": 2}
    told = completion(client, *edits)
    length = told["usage"]["prompt_tokens"]
    assert told["choices"][0]["intervene"]["edits"] == [
        {
            "do": "block",
            "layers": [0, 1],
            "heads": [0, 1, 2, 3],
            "queries": [[length - 1, length]],
            "keys": [[15, 21]],
            "elided": False,
        },
        {"do": "temper", "layers": [1], "heads": [3], "at": [[0, None]], "elided": False},
    ]
    assert told["usage"]["intervene"]["places"] == 2
    assert told["usage"]["intervene"]["tokens"] == 2 + length + 5


def test_the_same_vector_in_base64_is_the_same_edit(client):
    data = base64.b64encode(numpy.array([VECTOR, VECTOR], "<f2").tobytes()).decode()
    coded = {"data": data, "dtype": "f16", "shape": [2, WIDTH]}
    both = {"do": "add", "layers": [0, 1]}
    listed = completion(client, {**both, "vector": VECTOR})
    assert text(listed) == text(completion(client, {**both, "vector": coded}))


@pytest.mark.parametrize(
    "place",
    [
        {"layers": [-1, 0, 1]},
        {"part": "attn", "layers": "all"},
        {"part": "mlp", "layer": 1},
        {"part": "head", "layer": 0, "heads": [1, 2]},
        {"part": "neuron", "layer": 1, "neurons": [3, 60]},
        {"part": "q", "layers": "all"},
        {"part": "k", "layer": 0, "heads": [3]},
        {"part": "v", "layer": 1},
    ],
)
def test_a_patch_from_the_same_prompt_changes_no_bit(client, place):
    plain = completion(client, logprobs=2)["choices"][0]["logprobs"]
    own = {"do": "patch", **place, "at": "prompt", "from": {"prompt": PROMPT}}
    others = {"do": "ablate", **place, "at": "prompt", "with": {"prompt": PROMPT}}
    for edit in (own, others):
        patched = completion(client, edit, logprobs=2)
        assert patched["choices"][0]["logprobs"] == plain
        assert patched["usage"]["intervene"]["tokens"] > 0


def test_all_of_the_last_layer_from_another_prompt_is_that_prompts_answer(client):
    other = "The capital of Poland is"
    assert len(other) == len(PROMPT)
    edit = {"do": "patch", "layer": LAYERS - 1, "at": "last", "from": {"prompt": other}}
    patched = completion(client, edit, logprobs=3, max_tokens=1)["choices"][0]
    right = completion(client, logprobs=3, max_tokens=1, prompt=other)["choices"][0]
    assert patched["logprobs"] == right["logprobs"]


def test_numbers_are_put_from_one_position_to_another_in_pairs(client):
    def patch(at, origin):
        edit = {"do": "patch", "layer": 0, "at": at, "from": {"prompt": PROMPT, "at": origin}}
        answer = completion(client, edit, logprobs=2)["choices"][0]
        return answer["logprobs"], answer["intervene"]["edits"][0]

    swapped, told = patch([5, 2], [2, 5])
    assert told["at"] == [5, 2]
    assert told["from"] == {"at": [2, 5]}
    assert told["elided"] is False
    assert patch([2, 5], [5, 2])[0] == swapped
    assert patch([2, 5], [2, 5])[0] == completion(client, logprobs=2)["choices"][0]["logprobs"]
    assert patch([2, 5], [2, 2])[0] not in (swapped, patch([2, 5], [5, 5])[0])
    France = {"text": "France"}
    assert patch(France, France)[0] == patch("prompt", None)[0]
    assert patch([-1], [15])[0] == patch("last", [15])[0]


def test_a_conversation_is_edited_where_its_messages_are(client):
    plain = chat(client)["choices"][0]["message"]["content"]
    answer = chat(client, {**ADD, "at": {"span": "user"}}, n=2)
    for choice in answer["choices"]:
        assert choice["message"]["content"] != plain
        ((start, stop),) = choice["intervene"]["edits"][0]["at"]
        assert stop - start == len(MESSAGES[0]["content"])
    usage = answer["usage"]["intervene"]
    # The second answer begins with what was read for the first one.
    assert (usage["rows"], usage["tokens"]) == (2, stop - start)


@pytest.mark.parametrize("ask", [completion, chat])
def test_a_stream_says_its_plan_first_and_ends_with_what_it_took(ask, client):
    edit = {**ADD, "at": "generated"}
    whole = ask(client, edit)
    stream = ask(client, edit, stream=True, stream_options={"include_usage": True})
    first, *_, last = stream
    assert first["intervene"] == whole["choices"][0]["intervene"]
    assert not any("intervene" in chunk for chunk in stream[1:])
    for answer in (whole, last):  # the last token is read by nobody
        assert answer["usage"]["intervene"]["tokens"] == 6 - 1
    pieces = [choice for chunk in stream for choice in chunk["choices"]]
    if ask is completion:
        assert "".join(piece["text"] for piece in pieces) == text(whole)
    else:
        said = "".join(piece["delta"].get("content", "") for piece in pieces)
        assert said == whole["choices"][0]["message"]["content"]


def test_forms_tools_traces_and_scores_go_together_with_edits(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    trace = {"layers": [1], "topk": 2}
    more = {"response_format": form, "trace": trace, "logprobs": True, "max_tokens": 400}
    answer = chat(client, ADD, **more)
    (choice,) = answer["choices"]
    assert json.loads(choice["message"]["content"])["n"] in (1, 2)
    steps = choice["trace"]["steps"]
    assert len(steps) == len(choice["logprobs"]["content"])
    assert steps[0]["logprob"] == pytest.approx(choice["logprobs"]["content"][0]["logprob"], 1e-3)
    call = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    made = chat(client, ADD, tools=[call], tool_choice="required", max_tokens=60)
    assert made["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_a_trace_shows_the_edges_that_are_blocked_as_they_are(client):
    edit = {"do": "block", "layer": 0, "heads": [2], "keys": [3]}
    answer = completion(client, edit, trace={"layers": [0], "attn": "json"}, max_tokens=2)
    for step in answer["choices"][0]["trace"]["steps"]:
        weights = step["attn"][0]["weights"]
        assert weights[2][3] == 0 < weights[1][3]
        assert sum(weights[2]) == pytest.approx(1, abs=1e-3)


def test_a_trace_shows_the_edited_stream(client):
    far = {"do": "add", "vector": [1e4] * WIDTH, "layer": 0}
    answer = completion(client, far, trace={"resid_norms": True}, max_tokens=1)
    norms = answer["choices"][0]["trace"]["steps"][0]["resid_norms"]
    assert norms[0] == pytest.approx(1e4 * WIDTH**0.5, 0.01)


def test_responses_and_chat_stream_take_edits(client):
    body = {"input": "Hi", "max_output_tokens": 5, "temperature": 0, "store": False}
    plain, edited = (
        client.post("/v1/responses", json={**body, **own}).get_json()
        for own in ({}, {"intervene": {"edits": [ADD]}})
    )
    assert edited["usage"]["intervene"]["edits"] == 1
    assert edited["intervene"]["edits"][0]["layers"] == [0]
    assert "intervene" not in plain
    assert plain["output"] != edited["output"]
    body = {"messages": MESSAGES, "trace_layer": 0, "max_new_tokens": 3, "temperature": 0}
    response = client.post("/chat/stream", json={**body, "intervene": {"edits": [ADD]}})
    done = events(response)[-1]
    assert done["usage"]["intervene"]["edits"] == 1
    assert done["intervene"]["edits"][0]["at"] == [[0, None]]


HEADS = {"do": "ablate", "part": "head", "layer": 0}
REFUSED = {
    "intervene.edits[0].layer_s": (
        {"do": "add", "layer_s": 0},
        "'intervene.edits[0].layer_s' is unknown; did you mean 'layers'?",
    ),
    "intervene.edits[0].layers": (
        {**ADD, "layers": [2]},
        "intervene.edits[0].layers must be in [-1, 1]",
    ),
    "intervene.edits[0].heads": (
        {**HEADS, "heads": [4]},
        "intervene.edits[0].heads must be in [0, 3]",
    ),
    "intervene.edits[0].at": (
        {**ADD, "at": [30]},
        "intervene.edits[0].at must be in [-24, 29]",
    ),
    "intervene.edits[0].vector": (
        {**ADD, "vector": [1.0] * 31},
        "intervene.edits[0].vector has 31 numbers, the model's stream 32",
    ),
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_is_wrong_is_said_before_the_first_byte(client, param):
    edit, message = REFUSED[param]
    for stream in (False, True):
        response = client.post(
            "/v1/completions",
            json={
                "prompt": PROMPT,
                "max_tokens": 6,
                "stream": stream,
                "intervene": {"edits": [edit]},
            },
        )
        assert response.status_code == 400
        error = response.get_json()["error"]
        assert (error["message"], error["param"]) == (message, param)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({**ADD, "vector": "formal"}, "No vector 'formal' in the store; it is empty"),
        ({**ADD, "vector": [*VECTOR[:-1], "x"]}, "must be a name"),
        ({**ADD, "vector": {"data": "AAA", "dtype": "f32", "shape": [1]}}, "base64"),
        ({**ADD, "vector": {"data": "AAAA", "dtype": "f32", "shape": [1]}}, "3 bytes"),
        ({**ADD, "vector": [[1.0] * WIDTH] * 3}, "has 3 rows for 1 layers"),
        ({**ADD, "scale": 1e39}, "scale' must be a number"),
        ({**ADD, "layer": 0}, "exactly one of layer, layers, range"),
        ({"do": "add", "layer": 0}, "is required for add"),
        ({"do": "scale", "layer": 0}, "by' is required for scale"),
        ({**ADD, "by": 2}, "by' is not for add"),
        ({**ADD, "heads": [0]}, 'is for part "head"'),
        (HEADS, "heads' is required for part head"),
        ({**HEADS, "heads": []}, "must not be empty"),
        ({**ADD, "at": {"span": "user"}}, "no message of role 'user'"),
        ({**ADD, "at": {"text": "Rome"}}, "the text 'Rome' 0 times"),
        ({**ADD, "at": {"when": 1}}, "must be"),
        ({"do": "ablate", "layer": 0, "with": {"prompt": "x"}, "at": "prompt"}, "at their ends"),
        ({"do": "fix", "layer": 0}, "do' must be one of"),
        ({"do": "block", "layer": 0}, "keys' is required for block"),
        ({"do": "temper", "layer": 0}, "temperature' is required for temper"),
        ({"do": "temper", "layer": 0, "temperature": 0}, "must be"),
        ({"do": "block", "layer": 0, "keys": [40]}, "keys must be in [-24, 29]"),
        ({"do": "block", "layer": 2, "keys": [0]}, "layers must be in [0, 1]"),
        ({"do": "block", "layer": 0, "keys": [0], "heads": [4]}, "heads must be in [0, 3]"),
        ({"do": "block", "layer": 0, "keys": [0], "at": "last"}, "has queries and keys"),
        ({"do": "block", "layer": 0, "keys": [0], "part": "mlp"}, "part' is not for block"),
        ({"do": "block", "layer": 0, "keys": [0], "temperature": 2}, "is not for block"),
        ({**ADD, "keys": [0]}, "keys' is not for add"),
        ({"do": "patch", "layer": 0}, "from' is required for patch"),
        ({**ADD, "from": {"prompt": "x"}}, "from' is not for add"),
        ({"do": "patch", "layer": 0, "from": {"run": 1}}, "from' must be"),
        (
            {"do": "patch", "layer": 0, "at": [1, 2], "from": {"prompt": "xyz", "at": [1]}},
            "from.at has 1 positions for 2 of at",
        ),
        (
            {"do": "patch", "layer": 0, "at": [1], "from": {"prompt": "xyz", "at": [3]}},
            "from.at must be in [-3, 2]",
        ),
        ({"do": "patch", "layer": 0, "from": {"prompt": "xyz"}}, "3 positions for 24 of at"),
        ({**ADD, "part": "q"}, "has 32 numbers, a head 8"),
        ({**ADD, "part": "k", "vector": [1] * 8, "heads": [4]}, "heads must be in [0, 3]"),
        ({**ADD, "part": "v", "vector": [1] * 8, "layers": [-1]}, "layers must be in [0, 1]"),
        ({"do": "erase", "part": "q", "vector": [1] * 8, "layer": 0}, "for erase"),
        ({"do": "scale", "part": "q", "neurons": [0], "by": 2, "layer": 0}, 'is for part "neuron"'),
    ],
)
def test_messages_name_what_would_be_right(client, edit, words):
    status = 404 if edit.get("vector") == "formal" else 400
    message = completion(client, edit, status=status)["error"]["message"]
    assert words in message


def test_there_may_not_be_too_much(client):
    assert refusal(client, *[ADD] * 40)["message"] == "intervene has 40 edits (max 32)"
    many = {"do": "scale", "part": "mlp", "range": [0, 1], "by": 0.5}
    assert completion(client, *[many] * 32)["usage"]["intervene"]["edits"] == 32
    large = EditRequest(do="add", vector=numpy.zeros(600_000, numpy.float32))
    with pytest.raises(InvalidRequest) as refused:  # larger than bodies may be, by default
        check_size(InterveneRequest(edits=(large, large)))
    assert refused.value.message == (
        "vectors sent inline have 4.8 MB (max 4 MB); put them into /inspect/vectors"
    )


def test_another_prompt_is_as_long_as_an_inspected_one_at_most(client):
    for text, limit in (("é" * 9000, "18000 bytes (max 16384)"), ("x" * 3000, "(max 2048)")):
        edit = {"do": "ablate", "part": "mlp", "layer": 0, "with": {"prompt": text}}
        error = completion(client, edit, status=413)["error"]
        assert limit in error["message"]


def test_an_edit_that_is_too_much_ends_its_answer_with_an_error(client):
    error = refusal(client, {**ADD, "scale": 1e30})
    assert error["code"] == "intervention_failed"
    assert error["message"] == (
        "the edited stream of layer 0 became infinite at step 0; use a smaller scale"
    )
    late = completion(client, {**ADD, "scale": 1e30, "at": [26]}, stream=True)
    assert late[-1]["error"]["code"] == "intervention_failed"
    assert len(late) > 2
    assert completion(client)["usage"]["completion_tokens"] == 6


def test_it_can_be_switched_off(app, client, monkeypatch):
    services = app.extensions[EXTENSION]
    off = replace(services, settings=replace(services.settings, intervene_enabled=False))
    monkeypatch.setitem(app.extensions, EXTENSION, off)
    error = completion(client, ADD, status=403)["error"]
    assert error["message"] == "Interventions are disabled on this server"
    assert error["code"] == "intervene_disabled"


def test_a_vector_from_the_store_is_the_same_edit(client):
    vector = numpy.array([VECTOR, VECTOR[::-1]])
    body = {"vector": vector.tolist(), "layers": [0, 1], "model": "tiny"}
    assert client.put("/inspect/vectors/mood", json=body).status_code in (200, 201)
    sent = completion(client, {"do": "add", "vector": vector.tolist(), "layers": [0, 1]})
    stored = completion(client, {"do": "add", "vector": "mood", "layers": "all"})
    assert text(sent) == text(stored)
    message = refusal(client, {"do": "add", "vector": "mood", "layer": -1})["message"]
    assert message == "vector 'mood' has no direction for layer -1; it has layers [0, 1]"
    client.put("/inspect/vectors/short", json={"vector": [1.0, 2.0]})
    message = refusal(client, {"do": "add", "vector": "short", "layer": 0})["message"]
    assert message == "vector 'short' has 2 numbers, the model's stream 32"
    client.put("/inspect/vectors/other", json={"vector": VECTOR, "model": "twin"})
    edit = {"do": "add", "vector": "other", "layer": 0}
    assert refusal(client, edit)["message"] == (
        "vector 'other' was made for model 'twin'; send \"any_model\": true to use it all the same"
    )
    assert text(completion(client, {**edit, "any_model": True})) == text(completion(client, ADD))


def test_tokens_can_be_forced_and_the_model_goes_on_from_there(client):
    force = {"do": "force", "step": 1, "token_ids": [ord("x"), ord("y")]}
    plain, forced = (completion(client, *e, logprobs=1) for e in ((), (force,)))
    assert text(forced)[1:3] == "xy"
    assert text(forced)[0] == text(plain)[0]
    scores = forced["choices"][0]["logprobs"]
    assert scores["token_logprobs"][0] == plain["choices"][0]["logprobs"]["token_logprobs"][0]
    assert scores["token_logprobs"][1] < -0.1  # the model's own
    same = completion(client, prompt=PROMPT + text(forced)[:3], max_tokens=3)
    assert text(forced)[3:] == text(same)
    both = completion(client, force, ADD)
    assert text(both)[1:3] == "xy"
    assert both["choices"][0]["intervene"]["edits"][0]["token_ids"] == [120, 121]
    assert both["usage"]["intervene"]["edits"] == 2
    for edit, words in (
        ({**force, "step": 5}, "go beyond the 6 tokens"),
        ({**force, "token_ids": [999]}, "must be below"),
        ({**force, "layer": 1}, "layer' is not for force"),
        ({"do": "force", "step": 1}, "token_ids' is required for force"),
        ({**ADD, "step": 1}, "step' is for force"),
    ):
        assert words in refusal(client, edit)["message"]
    error = inspected(client, "tokens", force, status=422)
    assert "tokens that are written" in error["detail"]


def test_a_trace_measures_the_stream_along_a_vector_as_it_is_edited(client):
    client.put("/inspect/vectors/way", json={"vector": [VECTOR, VECTOR], "layers": [0, 1]})
    trace = {"probes": ["way"], "resid_norms": True}
    plain, edited = (completion(client, *e, trace=trace, max_tokens=1) for e in ((), (ADD,)))
    readings = [each["choices"][0]["trace"]["steps"][0] for each in (plain, edited)]
    before, after = (each["probes"][0] for each in readings)
    assert (before["vector"], before["layers"]) == ("way", [0, 1])
    length = numpy.linalg.norm(VECTOR)
    assert after["projection"][0] - before["projection"][0] == pytest.approx(length, rel=1e-3)
    for own in readings:
        (probe,) = own["probes"]
        norms = numpy.array(own["resid_norms"])
        numpy.testing.assert_allclose(probe["cosine"] * norms, probe["projection"], rtol=1e-3)
    refused = completion(client, trace={"probes": ["nobody"]}, status=404)
    assert "No vector 'nobody'" in refused["error"]["message"]


def inspected(client, route, *edits, status=200, **fields):
    body = {"prompt": PROMPT, **fields}
    if edits:
        body["intervene"] = {"edits": list(edits)}
    response = client.post(f"/inspect/{route}", json=body)
    assert response.status_code == status, response.get_data(as_text=True)
    return response.get_json()


def test_inspections_see_the_edited_model(client):
    options = {"layers": [-1, 0, 1], "positions": [2, 3], "format": "json"}
    edit = {**ADD, "at": [3]}
    plain, edited = (inspected(client, "hidden_states", *e, **options) for e in ((), (edit,)))
    moved = numpy.array(edited["states"]) - numpy.array(plain["states"])
    numpy.testing.assert_allclose(moved[1, 1], VECTOR, atol=1e-4)
    assert not moved[:, 0].any()
    assert not moved[0].any()
    assert abs(moved[2, 1]).max() > 0.1
    assert edited["intervene"]["edits"][0]["at"] == [[3, 4]]
    for route, more in (
        ("tokens", {"logprobs": True}),
        ("logit_lens", {}),
        ("full_attn", {"trace_layer": 1, "head": 0}),
        ("heads", {}),
        ("logit_parts", {"by": "head"}),
        ("attribution", {"positions": [3], "method": "occlusion"}),
        ("rollout", {}),
        ("ablate", {"part": "mlp"}),
    ):
        one, other = (inspected(client, route, *e, **more) for e in ((), (edit,)))
        assert other.pop("intervene")["edits"][0]["elided"] is False
        assert one != other, route


def test_what_an_inspection_reads_is_what_was_written_with_the_same_edits(client):
    edit = {**ADD, "at": "generated"}
    answer = completion(client, edit, logprobs=0)
    scores = answer["choices"][0]["logprobs"]["token_logprobs"]
    read = inspected(client, "tokens", edit, prompt=None, completion_id=answer["id"], logprobs=True)
    assert read["intervene"]["edits"][0]["at"] == [[24, None]]
    numpy.testing.assert_allclose(read["surprisal"][-6:], [-score for score in scores], atol=1e-3)


def test_inspections_refuse_in_their_own_words(client):
    error = inspected(client, "tokens", {**ADD, "layers": [7]}, status=422, logprobs=True)
    assert error["detail"] == "intervene.edits[0].layers must be in [-1, 1]"
    for route, own in (("logit_parts", {}), ("attribution", {}), ("rollout", {}), ("ablate", {})):
        error = inspected(client, route, {**ADD, "layers": [7]}, status=422, **own)
        assert error["detail"] == "intervene.edits[0].layers must be in [-1, 1]", route
    force = {"do": "force", "step": 0, "token_ids": [7]}
    error = inspected(client, "attribution", force, status=422)
    assert error["detail"] == "force is of tokens that are written, and these are read"


def test_a_logit_of_an_edited_answer_is_that_of_the_edited_model(client):
    edit = {**ADD, "at": "generated"}
    answer = completion(client, edit, trace={"parts": {"by": "head", "topk": 4}})
    step = answer["choices"][0]["trace"]["steps"][2]["parts"]
    asked = {"prompt": None, "completion_id": answer["id"], "position": len(PROMPT) + 1}
    asked |= {"token": answer["choices"][0]["trace"]["steps"][2]["token_id"], "by": "head"}
    read = inspected(client, "logit_parts", edit, **asked, topk=4096)
    assert read["logit"] == pytest.approx(step["logit"], abs=1e-3)
    assert read["model_logit"] == pytest.approx(step["model_logit"], abs=1e-3)
    (own,) = [part for part in read["parts"] if part["part"] == "edit"]
    assert (own["layer"], own["of"]) == (0, "resid")
    values = sum(part["value"] for part in read["parts"])
    total = values + read["rest"] + read["constant"] + read["rounding"]
    assert total == pytest.approx(read["logit"], abs=1e-4)
    assert abs(read["rounding"]) < 1e-3
    assert [part for part in step["shares"] if part["part"] == "edit"] == [
        {"part": "edit", "layer": 0, "of": "resid", "value": pytest.approx(own["value"], abs=1e-3)}
    ]


def test_who_asks_about_an_edited_answer_without_its_edits_is_told(client):
    edited, plain = completion(client, ADD), completion(client)
    for route, own in (("tokens", {"logprobs": True}), ("logit_parts", {}), ("rollout", {})):
        asked = {"prompt": None, "completion_id": edited["id"], **own}
        told = inspected(client, route, **asked)["intervene"]
        assert told["edits"] == []
        assert told["note"].startswith("the answer was written with edits")
        assert "note" not in inspected(client, route, ADD, **asked)["intervene"]
        assert "intervene" not in inspected(
            client, route, **{**asked, "completion_id": plain["id"]}
        )


def test_both_prompts_of_a_grid_are_read_with_the_edits(client):
    body = {
        "clean": PROMPT,
        "corrupt": "The capital of Frence is",
        "layers": [1],
        "positions": [-1],
    }
    edit = {**ADD, "scale": 0.01, "layers": [1], "at": "last"}
    grids = []
    for own in ({}, {"intervene": {"edits": [edit]}}):
        for form in ({}, {"method": "gradient"}, {"corrupt": {"noise": 1, "span": "prompt"}}):
            response = client.post("/inspect/patch", json={**body, "metric": "prob", **own, **form})
            assert response.status_code == 200, response.get_json()
            grids.append(response.get_json())
    for plain, edited in zip(grids[:3], grids[3:], strict=True):
        assert (plain["clean"], plain["corrupt"]) != (edited["clean"], edited["corrupt"])
        assert edited["intervene"]["edits"][0]["at"] == [[len(PROMPT) - 1, len(PROMPT)]]
    assert grids[0]["grid"] == [[1]]
    assert grids[3]["grid"] == [[1]]
    started = client.post(
        "/inspect/patch", json={**body, "intervene": {"edits": [edit]}, "job": True}
    )
    assert started.status_code == 202
    job = f"/inspect/jobs/{started.get_json()['id']}"
    client.get(f"{job}/events").get_data()
    exact = client.post("/inspect/patch", json={**body, "intervene": {"edits": [edit]}}).get_json()
    assert client.get(job).get_json()["result"] == exact
    named = {**edit, "at": {"text": "France"}}
    refused = client.post("/inspect/patch", json={**body, "intervene": {"edits": [named]}})
    assert refused.status_code == 422
    assert "has the text 'France' 0 times" in refused.get_json()["detail"]


def test_the_model_says_what_can_be_changed(client):
    told = client.get("/inspect/model").get_json()
    assert [each["layer"] for each in told["places"]] == [-1, 0, 1]
    assert told["places"][1].pop("verified") < 1e-4
    assert told["places"][1] == {
        "layer": 0,
        "resid": True,
        "attn": True,
        "mlp": True,
        "head": 4,
        "neuron": 64,
        "q": 4,
        "k": 4,
        "v": 4,
        "weights": True,
    }
    assert told["neighbours"] == "bit-equal"
    assert len(told["resid_norm"]) == LAYERS
    assert all(norm > 0 for norm in told["resid_norm"])


def test_an_answer_can_be_left_at_any_of_its_tokens(client):
    """And the way that it took is the way that it takes again."""
    ids = {"return_token_ids": True}
    first = completion(client, **ids)
    written = first["choices"][0]["token_ids"]
    for step in (0, 3, 5):
        branch = {"completion_id": first["id"], "step": step, "token_id": written[step]}
        again = completion(client, branch=branch, max_tokens=6 - step, **ids)
        assert again["choices"][0]["token_ids"] == written[step:]
        other = (written[step] + 1) % 97
        branch["token_id"] = other
        left = completion(client, branch=branch, **ids)
        assert left["choices"][0]["token_ids"][0] == other
        assert left["usage"]["prompt_tokens"] == len(PROMPT) + step
        cached = left["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == len(PROMPT) + step - 1
        ids_of_it = [*PROMPT.encode(), *written[:step]]
        forced = {"do": "force", "step": 0, "token_ids": [other]}
        assert (
            left["choices"][0]["token_ids"]
            == (completion(client, forced, prompt=ids_of_it, **ids)["choices"][0]["token_ids"])
        )
    # A branch of a branch, edited from there on.
    branch = {"completion_id": left["id"], "step": 1, "token_id": 7}
    edit = {**ADD, "at": "generated"}
    twice = completion(client, edit, branch=branch, **ids)
    assert twice["choices"][0]["token_ids"][0] == 7
    assert twice["usage"]["prompt_tokens"] == len(PROMPT) + 6
    assert twice["choices"][0]["intervene"]["edits"][0]["at"] == [[len(PROMPT) + 6, None]]


def test_conversations_can_be_left_too(client):
    first = chat(client, return_token_ids=True)
    (choice,) = first["choices"]
    branch = {"completion_id": first["id"], "step": 2, "token_id": choice["token_ids"][2]}
    again = chat(client, branch=branch, max_tokens=4, return_token_ids=True)
    assert again["choices"][0]["token_ids"] == choice["token_ids"][2:]
    *_, last = chat(client, branch=branch, stream=True, stream_options={"include_usage": True})
    assert last["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] + 2
    body = {"messages": MESSAGES, "trace_layer": 0, "max_new_tokens": 4, "temperature": 0}
    own = events(client.post("/chat/stream", json={**body, "branch": branch}))
    assert own[0]["token_id"] == choice["token_ids"][2]
    assert own[-1]["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] + 2


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"step": 7}, 400, "branch.step must be in [0, 6]"),
        ({"token_id": 1 << 20}, 400, "branch.token_id must be below"),
        ({"choice": 1}, 400, "choice must be in [0, 0]"),
        ({"completion_id": "cmpl-0"}, 404, "Completion 'cmpl-0' is not known"),
        ({"steps": 1}, 400, "'branch.steps' is unknown; did you mean 'step'?"),
    ],
)
def test_branches_that_are_not_there_are_refused(client, fields, status, words):
    made = completion(client)
    branch = {"completion_id": made["id"], "step": 1, "token_id": 5} | fields
    error = completion(client, branch=branch, status=status)["error"]
    assert words in error["message"]


def test_branches_are_of_ones_own_answers_and_go_with_no_form(app, client):
    made = completion(client)
    completions = app.extensions[EXTENSION].completions
    owner = completions.find(made["id"]).owner
    completions.remember("cmpl-other", fake_model(), [[1]], [[2]], owner)
    other = {"completion_id": "cmpl-other", "step": 0, "token_id": 5}
    message = completion(client, branch=other, status=400)["error"]["message"]
    assert message == "branch.completion_id is of model 'fake'"
    branch = {"completion_id": made["id"], "step": 1, "token_id": 5}
    body = {"prompt": PROMPT, "max_tokens": 2, "branch": branch}
    stranger = {"REMOTE_ADDR": "10.0.0.9"}
    response = client.post("/v1/completions", json=body, environ_overrides=stranger)
    assert response.status_code == 404
    assert response.get_json()["error"]["param"] == "branch.completion_id"
    for own in (
        {"response_format": {"type": "json_object"}},
        {"echo": True},
        {"prompt_logprobs": 1},
        {"prompt": [PROMPT, PROMPT]},
    ):
        error = client.post("/v1/completions", json={**body, **own}).get_json()["error"]
        assert "branch" in error["message"], own


ELSEWHERE = {
    "/v1/messages": {"max_tokens": 2, "messages": MESSAGES},
    "/api/chat": {"model": "tiny", "messages": MESSAGES},
    "/api/generate": {"model": "tiny", "prompt": PROMPT},
    "/generate": {"prompt": PROMPT},
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/api/embed": {"model": "tiny", "input": "a"},
}


@pytest.mark.parametrize("route", ELSEWHERE)
def test_other_routes_refuse_by_name_what_they_would_not_do(client, route):
    for name, value in (
        ("intervene", {"edits": [ADD]}),
        ("trace", {"topk": 1}),
        ("branch", {"completion_id": "x", "step": 0, "token_id": 1}),
    ):
        response = client.post(route, json={**ELSEWHERE[route], name: value})
        assert response.status_code in (400, 422), response.get_data(as_text=True)
        assert f"'{name}' is not supported" in response.get_data(as_text=True)


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (EmbeddingRequest, {"model": "tiny", "input": "a"}),
        (RerankRequest, {"model": "tiny", "query": "a", "documents": ["b"]}),
    ],
)
def test_vectors_and_scores_are_of_models_as_they_are(schema, body):
    schema().load(body)
    for name in ("intervene", "trace", "branch"):
        with pytest.raises(ValidationError, match="not supported"):
            schema().load({**body, name: {"edits": [ADD]}})
