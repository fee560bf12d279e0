"""Figures of each token over HTTP, and the stream's own rows asked for afterwards."""

from __future__ import annotations

import base64
import io

import numpy
import pytest

from tests import tokenizers
from tests.api.test_intervene import ADD, LAYERS, MESSAGES, PROMPT, WIDTH, events
from tests.api.tiny_app import running

FIGURES = {
    "layers": [0, 1],
    "lens": {"layers": [0, 1], "topk": 2},
    "uncertainty": True,
    "parts": {"by": "head", "topk": 3},
    "activations": [
        {"part": "resid", "layer": -1},
        {"part": "head", "layers": "all", "heads": [1, 3], "format": "topk", "topk": 2},
        {"part": "k", "layer": 1},
        {"part": "neuron", "layer": 0, "neurons": [5, 9]},
    ],
}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    with running(folder, {"tiny": tokenizers.byte_level()}) as app:
        yield app


@pytest.fixture
def client(app):
    return app.test_client()


def written(client, status=200, **fields):
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0.9, "seed": 1, "ignore_eos": True}
    response = client.post("/v1/completions", json=body | fields)
    assert response.status_code == status, response.get_data(as_text=True)
    return response.get_json() if not fields.get("stream") else events(response)


def steps_of(answer, index=0):
    return answer["choices"][index]["trace"]["steps"]


def ask(client, route, answer, status=200, how="as_written", **body):
    body = {"completion_id": answer["id"], "how": how, **body}
    response = client.post(f"/inspect/{route}", json=body)
    assert response.status_code == status, response.get_data(as_text=True)
    return response.get_json() if response.is_json else numpy.load(io.BytesIO(response.data))


def unpacked(shown):
    return numpy.frombuffer(base64.b64decode(shown["data"]), "<f2").reshape(shown["shape"])


# -- of each token


@pytest.mark.parametrize("stream", [False, True])
def test_every_figure_stands_on_its_token(client, stream):
    answer = written(client, trace=FIGURES, stream=stream)
    steps = [each["trace"] for each in answer if "trace" in each] if stream else steps_of(answer)
    steps = [step for step in steps if "step" in step]
    assert len(steps) == 5
    for step in steps:
        sure = step["uncertainty"]
        assert sure["entropy"] == step["entropy"]
        assert sure["settled_layer"] in (0, 1)
        assert sure["lens_kl"] > 0
        parts = step["parts"]
        total = sum(share["value"] for share in parts["shares"])
        total += parts["rest"] + parts["constant"] + parts["rounding"]
        assert total == pytest.approx(parts["logit"], abs=1e-4)
        assert parts["model_logit"] == pytest.approx(parts["logit"], abs=1e-4)
        assert len(parts["shares"]) == 3
        embedding, *heads, key, neurons = step["activations"]
        assert unpacked(embedding).shape == (1, WIDTH)
        assert [(each["layer"], len(each["idx"]), len(each["values"][0])) for each in heads] == [
            *((layer, 2, 2) for layer in range(LAYERS))
        ]
        assert (unpacked(key).shape, unpacked(neurons).shape) == ((4, 8), (1, 2))


def test_choices_agree_in_the_usage(client):
    trace = {"uncertainty": True}
    same = written(client, trace=trace, temperature=0, n=2)["usage"]["trace"]["agreement"]
    assert same == [{"share": 1.0, "distinct": 1, "prefix": 1.0}]
    options = {"stream_options": {"include_usage": True}, "stream": True, "n": 3, "seed": 4}
    last = written(client, trace=trace, prompt=[PROMPT, "x"], **options)[-1]
    assert [each["distinct"] for each in last["usage"]["trace"]["agreement"]] == [3, 3]
    assert "agreement" not in written(client, trace=trace)["usage"]["trace"]


REFUSED = [
    ({"activations": [{"part": "resid", "layers": []}]}, "must not be empty"),
    ({"activations": [{"part": "neuron", "layer": 0, "neurons": [64]}]}, "must be in [0, 63]"),
    ({"activations": [{"part": "q", "layer": 5}]}, "trace.activations[0].layers must be in [0, 1]"),
    ({"activations": [{"part": "q", "layer": 0, "head": 1}]}, "did you mean 'heads'?"),
    ({"activations": [{"part": "resid", "layer": 0}] * 65}, "must have from 1 to 64 items"),
    ({"parts": {"by": "neuron"}}, "must be one of"),
    ({"uncertain": True}, "did you mean 'uncertainty'?"),
]


@pytest.mark.parametrize(("trace", "message"), REFUSED)
def test_what_cannot_be_shown_is_refused_by_name(client, trace, message):
    assert message in written(client, status=400, trace=trace)["error"]["message"]


# -- as it was written


@pytest.mark.parametrize("intervene", [None, {"edits": [ADD]}])
def test_rows_asked_for_as_written_are_those_of_the_stream_to_the_bit(client, intervene):
    edits = {} if intervene is None else {"intervene": intervene}
    trace = {"layers": [1], "attn": "json64", "topk": 2, "lens": {"layers": [0, 1], "topk": 2}}
    answer = written(client, trace=trace, **edits)
    steps = steps_of(answer)
    first = len(PROMPT) - 1

    shown = ask(client, "full_attn", answer, trace_layer=1, head="all", format="f16", **edits)
    rows = unpacked(shown["attn"])
    assert shown["rows"] == [first, first + 5]
    for place, step in enumerate(steps):
        row = numpy.array(step["attn"][0]["weights"], numpy.float32).astype(numpy.float16)
        assert numpy.array_equal(rows[:, place, : row.shape[1]], row)

    table = ask(client, "tokens", answer, logprobs=True, topk=2, **edits)
    for name in ("surprisal", "entropy", "rank", "topk"):
        assert table[name][: first + 1] == [None] * (first + 1)
        assert table[name][first + 1 :] == [step[name] for step in steps]

    lens = ask(client, "logit_lens", answer, positions="all", layers=[0, 1], topk=2, **edits)
    assert lens["positions"] == list(range(first, first + 5))
    for cells, target, step in zip(lens["cells"], lens["targets"], steps, strict=True):
        assert target["token_id"] == step["token_id"]
        for cell, reading in zip(cells, step["lens"], strict=True):
            assert cell["topk"] == reading["topk"]
            assert cell["target_rank"] == reading["rank_of_sampled"]
            assert cell["target_prob"] == reading["prob_of_sampled"]


def test_streams_as_written_are_those_of_the_run_to_the_bit(client):
    activations = [{"part": "resid", "layers": [-1, 1], "format": "stored"}]
    answer = written(client, trace={"store": True, "activations": activations})
    run_id = answer["choices"][0]["trace"]["header"]["run"]
    kept = numpy.load(io.BytesIO(client.get(f"/inspect/runs/{run_id}?format=npz").data))
    count = len(PROMPT) + 4
    states = ask(client, "hidden_states", answer, layers=[-1, 1], positions=list(range(count)))
    assert numpy.array_equal(states["states"], [kept["resid.-1"], kept["resid.1"]])


def test_rows_read_at_once_say_how_far_they_may_be_off_and_are_not_further(client):
    answer = written(client, trace={"topk": 1})
    table = ask(client, "tokens", answer, how="at_once", logprobs=True)
    assert (table["how"], table["differs_up_to"]) == ("at_once", 1e-4)
    again = ask(client, "tokens", answer, logprobs=True)
    assert "differs_up_to" not in again
    own, right = table["surprisal"][-5:], again["surprisal"][-5:]
    assert own == pytest.approx(right, rel=1e-4)
    plain = client.post("/inspect/tokens", json={"prompt": "Hi", "logprobs": True}).get_json()
    assert "how" not in plain


OUTSIDE = [
    ("full_attn", {"trace_layer": 0, "head": 0, "rows": [0, 9]}, "rows must be in"),
    ("logit_lens", {"positions": [0]}, "positions must be in"),
    ("hidden_states", {"positions": [-1]}, "positions must be in [0, "),
    ("logit_lens", {"positions": [-2], "target": 3}, 'target must be "sampled"'),
    ("heads", {}, "not supported"),
]


@pytest.mark.parametrize(("route", "body", "message"), OUTSIDE)
def test_what_no_pass_of_the_stream_showed_is_refused(client, route, body, message):
    answer = written(client)
    refused = ask(client, route, answer, status=422, **body)
    assert message in str(refused)


def test_only_a_recent_answer_was_written(client):
    body = {"messages": MESSAGES, "logprobs": True, "how": "as_written"}
    response = client.post("/inspect/tokens", json=body)
    assert response.status_code == 422
    assert response.get_json()["detail"] == 'how "as_written" needs a completion_id'


# -- small pushes


def stability(client, status=200, **body):
    response = client.post("/inspect/stability", json=body)
    assert response.status_code == status, response.get_data(as_text=True)
    return response.get_json()


def test_a_larger_push_moves_predictions_further_and_the_same_seed_as_far(client):
    answer = written(client)
    small = stability(client, completion_id=answer["id"], scale=0.01)
    large = stability(client, completion_id=answer["id"], scale=1.0)
    assert [each["position"] for each in small["tokens"]] == list(
        range(len(PROMPT), len(PROMPT) + 5)
    )
    assert (small["layer"], small["samples"]) == (1, 5)
    for less, more in zip(small["tokens"], large["tokens"], strict=True):
        assert 0 < less["kl_mean"] <= less["kl_max"] < more["kl_mean"]
    assert stability(client, completion_id=answer["id"], scale=1.0) == large
    assert stability(client, completion_id=answer["id"], scale=1.0, seed=1) != large
    edited = stability(client, completion_id=answer["id"], intervene={"edits": [ADD]})
    assert edited["intervene"]["edits"][0]["do"] == "add"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "Hi", "layer": 2}, "layer must be in [-1, 1]"),
        ({"prompt": "H"}, "needs a text of two tokens"),
        ({"prompt": "Hi", "scale": 0}, "must be a number above 0"),
        ({"prompt": "Hi", "samples": 17}, "must be an integer from 1 to 16"),
    ],
)
def test_pushes_that_cannot_be_are_refused(client, body, message):
    assert message in str(stability(client, status=422, **body))
