"""Runs of a real engine: kept, shown, written again to the bit, compared, and what is refused."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy
import pytest

from tests import tokenizers
from tests.api.test_intervene import ADD, LAYERS, MESSAGES, PROMPT, WIDTH, events
from tests.api.tiny_app import running
from transformers_api.api.http.services import EXTENSION

URL = "/inspect/runs"
PARTS = [
    {"part": "resid", "layers": [-1, 0], "format": "stored"},
    {"part": "mlp", "layers": "all", "format": "topk", "topk": 2},
    {"part": "q", "layer": 1, "heads": [3]},
]
BODIES = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 5},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 5},
    "/chat/stream": {"messages": MESSAGES, "max_new_tokens": 5, "trace_layer": 0},
}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with running(folder, {"tiny": tokenizers.byte_level()}) as app:
        yield app


@pytest.fixture
def client(app):
    return app.test_client()


def made(client, status=201, **body):
    response = client.post(URL, json={"prompt": PROMPT, "max_tokens": 5, **body})
    assert response.status_code == status, response.get_data(as_text=True)
    return response.get_json()


def lines(client, run_id):
    response = client.get(f"{URL}/{run_id}")
    assert response.status_code == 200, response.get_data(as_text=True)
    meta, *steps = map(json.loads, response.get_data().splitlines())
    return meta, steps


def archive(client, run_id):
    return numpy.load(io.BytesIO(client.get(f"{URL}/{run_id}?format=npz").data))


def replayed(client, run_id):
    response = client.post(f"{URL}/{run_id}/replay")
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()


def test_an_answer_is_kept_with_its_ids_traces_edits_and_activations(client):
    trace = {"topk": 2, "lens": {"layers": [0, 1]}, "activations": PARTS}
    described = made(client, trace=trace, intervene={"edits": [ADD]})
    meta, steps = lines(client, described["id"])
    assert described["completion_tokens"] == len(steps) == len(meta["token_ids"])
    assert described["prompt_tokens"] == len(PROMPT)
    assert meta["text"].startswith("".join(meta["tokens"][:1]))
    assert meta["intervene"] == {"edits": [ADD]}
    assert meta["edits"][0]["layers"] == [0]
    assert [step["token_id"] for step in steps] == meta["token_ids"]
    for step in steps:
        assert [(each["part"], each["layer"]) for each in step["activations"]] == [
            *(("mlp", layer) for layer in range(LAYERS)),
            ("q", 1),
        ]
    kept = archive(client, described["id"])
    count = len(PROMPT) + len(steps) - 1
    for entry in meta["activations"]:
        assert kept[entry["array"]].shape == tuple(entry["shape"]) == (count, WIDTH)
    assert {entry["array"] for entry in meta["activations"]} == {
        *("resid.-1", "resid.0", "mlp.0", "mlp.1", "q.1")
    }
    (listed,) = [run for run in client.get(URL).get_json()["data"] if run["id"] == meta["id"]]
    assert listed == described


def test_what_is_shown_of_a_token_is_what_is_kept_of_it(client):
    described = made(client, trace={"activations": PARTS})
    meta, steps = lines(client, described["id"])
    rows = archive(client, described["id"])["mlp.1"]
    for step in steps:
        shown = next(each for each in step["activations"] if each["layer"] == 1)
        row = rows[step["position"] - 1]
        numpy.testing.assert_allclose(shown["values"][0], row[shown["idx"][0]], rtol=1e-5)
        assert numpy.abs(row).argmax() == shown["idx"][0][0]
    assert meta["params"] == {"max_tokens": 5, "temperature": 0.0, "seed": meta["params"]["seed"]}


@pytest.mark.parametrize(
    ("route", "stream"),
    [
        *((route, stream) for route in BODIES for stream in (False, True) if "chat/s" not in route),
        ("/chat/stream", True),
    ],
)
def test_every_route_that_writes_keeps_what_it_wrote(client, route, stream):
    body = {**BODIES[route], "temperature": 0.9, "intervene": {"edits": [ADD], "store": True}}
    if route != "/chat/stream":
        body["stream"] = stream
    response = client.post(route, json=body)
    assert response.status_code == 200, response.get_data(as_text=True)
    (run_id,) = set(re.findall(r"run-[0-9a-f]{16}", response.get_data(as_text=True)))
    meta, steps = lines(client, run_id)
    assert meta["edits"][0]["do"] == "add"
    assert len(steps) == len(meta["token_ids"]) > 0
    assert replayed(client, run_id)["identical"]


def test_each_choice_is_a_run_of_its_own_and_is_written_again_as_it_was(client):
    trace = {"store": True, "activations": [PARTS[0]]}
    body = {"prompt": PROMPT, "max_tokens": 4, "n": 2, "temperature": 1.0, "trace": trace}
    answer = client.post("/v1/completions", json=body).get_json()
    ids = [choice["trace"]["header"]["run"] for choice in answer["choices"]]
    assert [run_id[-2:] for run_id in ids] == ["-0", "-1"]
    for run_id, choice in zip(ids, answer["choices"], strict=True):
        meta, steps = lines(client, run_id)
        assert meta["text"] == choice["text"]
        assert "activations" in steps[0]
        assert replayed(client, run_id) == {
            "id": run_id,
            "identical": True,
            "same_weights": True,
            "tokens": len(meta["token_ids"]),
            "first_difference": None,
        }
    one, other = (archive(client, run_id)["resid.0"] for run_id in ids)
    assert numpy.array_equal(one[: len(PROMPT)], other[: len(PROMPT)])
    compared = client.get(f"{URL}/compare?a={ids[0]}&b={ids[1]}").get_json()
    assert compared["same_prompt"]
    assert not compared["identical"]
    assert compared["activations"][1]["cosine"][: len(PROMPT)] == [1.0] * len(PROMPT)


def test_a_replay_names_the_first_token_that_is_another(client, app):
    services = app.extensions[EXTENSION]
    put = {"vector": [float(i % 5) for i in range(WIDTH)]}
    client.put("/inspect/vectors/dial", json=put)
    edits = [{"do": "add", "vector": "dial", "layers": [0], "scale": 9.0}]
    described = made(client, intervene={"edits": edits})
    assert replayed(client, described["id"])["identical"]
    client.put("/inspect/vectors/dial", json={"vector": [-x for x in put["vector"]]})
    difference = replayed(client, described["id"])["first_difference"]
    meta, _ = lines(client, described["id"])
    assert difference["token_id"] == meta["token_ids"][difference["step"]] != difference["other_id"]
    client.delete("/inspect/vectors/dial")
    gone = client.post(f"{URL}/{described['id']}/replay")
    assert (gone.status_code, gone.get_json()["error"]) == (
        404,
        "No vector 'dial' in the store; it is empty",
    )
    assert services.vectors.of("") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intervene": 5}, "are none that this server knows"),
        ({"intervene": {"edits": [{"do": "undo"}]}}, "are none that this server knows"),
        ({"prompt_ids": [10**9]}, "'run' has token id 1000000000"),
    ],
)
def test_a_run_of_another_model_or_server_is_not_written_again(client, app, changes, message):
    runs = app.extensions[EXTENSION].runs
    run = runs.get("127.0.0.1", made(client)["id"])
    tokens = {"prompt_tokens": ["a"]} if "prompt_ids" in changes else {}
    runs.put("127.0.0.1", replace(run, **changes, **tokens))
    response = client.post(f"{URL}/{run.id}/replay")
    assert response.status_code == 422
    assert message in response.get_json()["detail"]


def test_the_page_of_a_run_is_one_file_in_which_no_text_is_code(client):
    described = made(client, stop=["</script><script>alert(1)</script>"])
    response = client.get(f"{URL}/{described['id']}?format=html")
    page = response.get_data(as_text=True)
    assert response.content_type == "text/html; charset=utf-8"
    assert "alert(1)" in page
    assert page.count("</script>") == 2
    assert not re.search(r"(src|href)=|https?://|import ", page)
    assert "script-src 'sha256-" in response.headers["Content-Security-Policy"]
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["id"] == described["id"]


def test_a_run_is_forgotten(client):
    described = made(client)
    answer = client.delete(f"{URL}/{described['id']}").get_json()
    assert answer == {"id": described["id"], "deleted": True}
    assert client.get(f"{URL}/{described['id']}").status_code == 404
    assert client.post(f"{URL}/{described['id']}/replay").status_code == 404


REFUSED = [
    ({"trace": {"activations": [{"part": "mlp", "layer": 2}]}}, "layers must be in [0, 1]"),
    ({"trace": {"activations": [{"part": "mlp", "layer": -1}]}}, "layers must be in [0, 1]"),
    ({"trace": {"activations": [{"part": "mlp"}]}}, "needs exactly one of layer, layers"),
    ({"trace": {"activations": [{"part": "x", "layer": 0}]}}, "must be one of"),
    ({"trace": {"activations": [{"part": "q", "layer": 0, "heads": [4]}]}}, "must be in [0, 3]"),
    ({"trace": {"activations": [{"part": "mlp", "layer": 0, "heads": [0]}]}}, "is for parts head"),
    ({"prompt": ""}, "prompt must not be empty"),
    ({"token_ids": [1]}, "give exactly one of messages, prompt, token_ids"),
    ({"max_token": 3}, "did you mean 'max_tokens'?"),
    ({"intervene": {"edits": [ADD], "store": True}}, "is not supported"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(client, body, message):
    refusal = made(client, status=422, **body)
    assert message in json.dumps(refusal).replace('\\"', '"')


def test_what_is_only_kept_needs_a_run(client):
    trace = {"activations": [{"part": "mlp", "layer": 0, "format": "stored"}]}
    response = client.post("/v1/completions", json={"prompt": PROMPT, "trace": trace})
    assert response.status_code == 400
    assert response.get_json()["error"]["message"] == (
        'trace.activations[0].format "stored" needs "store": true'
    )


def test_a_form_is_kept_but_not_written_again(client):
    body = {
        "messages": MESSAGES,
        "max_tokens": 20,
        "response_format": {"type": "json_object"},
        "trace": {"store": True},
    }
    answer = client.post("/v1/chat/completions", json=body).get_json()
    run_id = answer["choices"][0]["trace"]["header"]["run"]
    meta, _ = lines(client, run_id)
    assert not meta["can_replay"]
    refused = client.post(f"{URL}/{run_id}/replay")
    assert (refused.status_code, "written in a form" in refused.get_data(as_text=True)) == (
        422,
        True,
    )


def test_a_comparison_needs_two_runs(client):
    for query, status in (("", 422), ("?a=run-0", 404), ("?a=x&b=y", 404)):
        assert client.get(f"{URL}/compare{query}").status_code == status
    assert client.get(f"{URL}/{made(client)['id']}?format=csv").status_code == 422


def test_a_stream_says_the_run_in_its_first_chunk_and_keeps_it_before_its_end(client):
    trace = {"store": True, "topk": 1}
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True, "trace": trace}
    first, *_ = events(client.post("/v1/chat/completions", json=body))
    meta, steps = lines(client, first["trace"]["run"])
    assert len(steps) == len(meta["token_ids"])


@pytest.mark.parametrize("part", ["resid", "attn", "mlp", "head", "neuron", "q", "k", "v"])
def test_numbers_of_a_run_can_be_put_back_and_change_no_bit(client, part):
    units = {"neuron": {"neurons": "all"}}.get(part, {})
    if part in ("head", "q", "k", "v"):
        units = {"heads": "all"}
    stored = [{"part": part, "layers": "all", "format": "stored"}]
    run = made(client, trace={"activations": stored})["id"]
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "logprobs": 2}
    plain = client.post("/v1/completions", json=body).get_json()["choices"][0]["logprobs"]
    place = {"part": part, "layers": "all", **units}
    every = list(range(len(PROMPT) + 4))
    for edit in (
        {"do": "patch", **place, "at": every, "from": {"run": run, "at": every}},
        {"do": "ablate", **place, "with": {"run": run}},
        {"do": "ablate", **place, "with": {"run": run}, "at": "generated"},
    ):
        sent = {**body, "intervene": {"edits": [edit]}}
        answer = client.post("/v1/completions", json=sent).get_json()
        assert answer["choices"][0]["logprobs"] == plain
        assert answer["usage"]["intervene"]["tokens"] >= LAYERS * 4


def test_runs_that_numbers_are_taken_from_are_there_and_have_them(client):
    run = made(client, trace={"activations": PARTS[:1]})["id"]
    body = {"prompt": PROMPT, "max_tokens": 2}
    for origin, status, words in (
        ({"run": "run-0123456789abcdef"}, 404, "run-0123456789abcdef"),
        ({"run": run, "at": [99]}, 400, "intervene.edits[0].from.at must be in [-24, 27]"),
    ):
        edit = {"do": "patch", "layer": 0, "at": [1], "from": origin}
        answer = client.post("/v1/completions", json={**body, "intervene": {"edits": [edit]}})
        assert answer.status_code == status
        assert words in answer.get_json()["error"]["message"]
    edit = {"do": "ablate", "layer": 1, "with": {"run": run}}
    error = client.post("/v1/completions", json={**body, "intervene": {"edits": [edit]}}).get_json()
    assert "has no resid of layer 1; it has" in error["error"]["message"]
    assert error["error"]["param"] == "intervene.edits[0].with"
