"""/inspect/lenses, /inspect/saes and /inspect/calibration with a real engine, and traces by them."""

from __future__ import annotations

import io
import json

import numpy
import pytest
import torch
from safetensors.numpy import save

from tests import tokenizers
from tests.api.test_intervene import completion
from tests.api.tiny_app import running
from transformers_api.api.http.services import EXTENSION
from transformers_api.api.inspect import lenses
from transformers_api.serving.inspect.calibration import TEXT

PROMPT, WIDTH, LAYERS, FEATURES = "The capital of France is", 32, 2, 64
BYTES = "application/octet-stream"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lenses")
    with running(folder, dict.fromkeys(["tiny", "twin"], tokenizers.byte_level())) as app:
        yield app


@pytest.fixture
def client(app):
    client = app.test_client()
    yield client
    services = app.extensions[EXTENSION]
    for store in (services.lenses, services.saes):
        for path in store._root.rglob("*.safetensors"):
            path.unlink()


def put(client, kind, name, data, query="", status=201, **options):
    options = {"content_type": BYTES} | options
    response = client.put(f"/inspect/{kind}/{name}{query}", data=data, **options)
    assert response.status_code == status, response.get_data(as_text=True)
    body = response.get_json()
    return body if status < 400 else body.get("detail") or body["error"]


def tuned(scale=0.0, layers=LAYERS, width=WIDTH):
    rows = numpy.random.default_rng(0).normal(size=(layers, width, width)) * scale
    value = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(layers)])
    for layer, matrix in zip(value, rows, strict=True):
        layer.weight.data = torch.from_numpy(matrix).float()
        layer.bias.data.zero_()
    file = io.BytesIO()
    torch.save(value.state_dict(), file)
    return file.getvalue()


def npz(weights):
    file = io.BytesIO()
    numpy.savez(file, **weights)
    return file.getvalue()


def arrays(**others):
    """A Jacobian lens as an archive of numpy."""
    whole = {name: numpy.array(numbers, int) for name, numbers in others.items()}
    matrices = whole.pop("J", numpy.stack([numpy.eye(WIDTH, dtype=int)] * 2))
    return npz({"J": matrices.astype(float), **whole})


def named(name):
    """A safetensors file with a tensor of this name, which is JSON already."""
    header = f'{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'
    return len(header).to_bytes(8, "little") + header.encode() + bytes(4)


def jacobian(**others):
    file = io.BytesIO()
    one = torch.eye(WIDTH)
    value = {"J": {0: one, 1: one}, "d_model": WIDTH, "source_layers": [0, 1]}
    torch.save(value | others, file)
    return file.getvalue()


def lens(client, **fields):
    response = client.post("/inspect/logit_lens", json={"prompt": PROMPT, **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()


@pytest.mark.parametrize(("kind", "data"), [("tuned", tuned), ("jacobian", jacobian)])
def test_a_lens_is_checked_kept_used_and_forgotten(client, kind, data):
    made = put(client, "lenses", "mine", data())
    assert (made["kind"], made["model"], made["width"]) == (kind, "tiny", WIDTH)
    assert made["layers"] == ([-1, 0] if kind == "tuned" else [0, 1])
    assert made["kl"] == made["kl_plain"]
    assert made["note"] is None
    put(client, "lenses", "mine", data(), status=200)
    plain, via = lens(client), lens(client, via="mine")
    assert via.pop("via") == "mine"
    assert via == plain
    trace = {"lens": {"layers": "all", "via": "mine"}}
    traced = completion(client, trace=trace)["choices"][0]["trace"]
    other = completion(client, trace={"lens": {"layers": "all"}})["choices"][0]["trace"]
    assert [step["lens"] for step in traced["steps"]] == [step["lens"] for step in other["steps"]]
    (listed,) = client.get("/inspect/lenses").get_json()["data"]
    assert listed == client.get("/inspect/lenses/mine").get_json() == {**made, **listed}
    assert client.delete("/inspect/lenses/mine").get_json() == {"name": "mine", "deleted": True}
    assert client.get("/inspect/lenses/mine").status_code == 404


def test_a_lens_that_reads_worse_than_none_comes_with_a_note(client, monkeypatch):
    monkeypatch.setattr(lenses, "MOST_KL", 0.0)  # a random model says almost the same everywhere
    made = put(client, "lenses", "bad", tuned(scale=30.0))
    assert made["note"].startswith("after layer 0 it reads worse than the head alone")
    assert made["kl"][-1] > made["kl_plain"][-1]
    assert lens(client, via="bad") != lens(client)


@pytest.mark.parametrize(
    ("name", "data", "status", "message"),
    [
        ("a", tuned(width=16), 422, "the lens has 16 numbers, the model's stream 32"),
        ("a", tuned(layers=4), 422, "the lens has layer 2, the model layers up to 1"),
        ("a", jacobian(d_model=3), 422, "d_model is not the width of J"),
        ("a", jacobian(d_model=[WIDTH, WIDTH]), 422, "d_model is not the width of J"),
        ("a", arrays(d_model=[]), 422, "d_model is not the width of J"),
        ("a", arrays(J=numpy.zeros((0, 4, 4)), source_layers=[]), 422, "J has no layers"),
        ("a", named(r"\ud800"), 422, "there are: ?"),
        ("a", named(r"a\udc00b"), 422, "there are: a?b"),
        ("a", jacobian(J={0: torch.zeros(2, 3)}), 422, "must be [width, width]"),
        ("a", jacobian(J=torch.zeros(3, 4, 4)), 422, "for 2 source_layers"),
        ("a", jacobian(J={0: torch.full((WIDTH, WIDTH), torch.nan)}), 422, "must be finite"),
        ("a", save({"W": numpy.zeros(2, numpy.float32)}), 422, "The file is no lens"),
        ("a", b"PK", 422, "The file is refused"),
        ("a", b"", 422, "The body is empty"),
        ("A", b"x", 422, "name must have 1 to 64"),
    ],
)
def test_what_is_no_lens_is_refused(client, name, data, status, message):
    assert message in put(client, "lenses", name, data, status=status)
    assert client.get("/inspect/lenses").get_json()["data"] == []


def test_names_that_are_not_there_and_other_models_are_named(client):
    put(client, "lenses", "mine", tuned())
    response = client.post("/inspect/logit_lens", json={"prompt": PROMPT, "via": "none"})
    assert response.status_code == 404
    assert response.get_json()["error"] == "No lens 'none' in the store; there are: mine"
    body = {"prompt": PROMPT, "via": "mine", "model": "twin"}
    response = client.post("/inspect/logit_lens", json=body)
    assert response.get_json()["detail"] == "lens 'mine' was made for model 'tiny'"


# -- sparse autoencoders


def numbers(width=WIDTH, **others):
    basis = numpy.linalg.qr(numpy.random.default_rng(1).normal(size=(width, width)))[0]
    both = numpy.concatenate([basis, -basis], 1).astype(numpy.float32)
    weights = {
        "W_enc": both,
        "W_dec": numpy.ascontiguousarray(both.T),
        "b_enc": numpy.zeros(2 * width, numpy.float32),
        "b_dec": numpy.zeros(width, numpy.float32),
    }
    return weights | others


def cfg(**others):
    value = {"architecture": "standard", "hook_name": "blocks.1.hook_resid_pre", **others}
    return json.dumps(value).encode()


def form(weights, settings):
    return {
        "weights": (io.BytesIO(weights), "sae_weights.safetensors"),
        "cfg": (io.BytesIO(settings), "cfg.json"),
    }


def put_form(client, name, weights=None, status=201, **settings):
    data = form(save(weights or numbers()), cfg(**settings))
    return put(client, "saes", name, data, status=status, content_type="multipart/form-data")


def test_an_autoencoder_of_saelens_is_tried_kept_and_forgotten(client):
    made = put_form(client, "one")
    assert (made["architecture"], made["part"], made["layer"]) == ("standard", "resid", 0)
    assert (made["features"], made["width"], made["model"]) == (FEATURES, WIDTH, "tiny")
    assert made["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert made["l0"] == pytest.approx(WIDTH)
    assert made["note"] is None
    (listed,) = client.get("/inspect/saes").get_json()["data"]
    assert listed["name"] == "one"
    assert client.delete("/inspect/saes/one").get_json() == {"name": "one", "deleted": True}
    assert client.get("/inspect/saes/one").status_code == 404


def test_one_of_gemma_scope_is_a_plain_file_with_its_place_in_the_query(client):
    weights = numbers(threshold=numpy.full(FEATURES, 1e9, numpy.float32))
    made = put(client, "saes", "scope", npz(weights), "?part=mlp&layer=1")
    assert (made["architecture"], made["part"], made["layer"]) == ("jumprelu", "mlp", 1)
    assert (made["l0"], made["dead"], made["subtracts_bias"]) == (0, 1, False)
    assert made["note"].startswith("does not fit this model: it explains ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hook_name": "blocks.1.attn.hook_z"}, "is none of hook_resid_pre"),
        ({"hook_name": "blocks.9.hook_resid_post"}, "is of layer 9; layers must be in [-1, 1]"),
        ({"hook_name": "blocks.2.hook_mlp_out"}, "layers must be in [0, 1]"),
        ({"architecture": "transcoder"}, "architecture must be one of"),
        ({"architecture": "jumprelu"}, "needs its threshold"),
        ({"architecture": "topk"}, "k is required for topk"),
        ({"architecture": "topk", "k": FEATURES + 1}, f"k must be at most {FEATURES}"),
        ({"architecture": "topk", "k": 10**30}, f"k must be at most {FEATURES}"),
        ({"hook_name": "blocks.\ud800"}, "cfg.hook_name 'blocks.?' is none of"),
        ({"hook_name": "x" * 9000}, "cfg.hook_name 'xxx"),
        ({"activation_fn": "tanh-relu", "architecture": None}, "'tanh-relu' is not known"),
        ({"normalize_activations": "expected_average_only_in"}, "to be folded into the weights"),
        ({"apply_b_dec_to_input": 1}, "must be true or false"),
        ({"rescale_acts_by_decoder_norm": True}, "to be folded into the weights"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(client, settings, message):
    assert message in put_form(client, "one", status=422, **settings)


@pytest.mark.parametrize(
    ("weights", "query", "message"),
    [
        (numbers(16), "?layer=0", "has 16 numbers, the model's stream 32"),
        (numbers(), "", "the place is not known"),
        (numbers(), "?layer=x", "layer must be a whole number from -1"),
        (numbers(), "?part=head&layer=0", "part must be one of: resid, attn, mlp"),
        (numbers(W_dec=numpy.zeros((3, 3), "f4")), "?layer=0", "the decoder has the shape [3, 3]"),
        (numbers(b_enc=numpy.full(FEATURES, numpy.inf, "f4")), "?layer=0", "must be finite"),
        ({"W_dec": numpy.zeros((3, 3), "f4")}, "?layer=0", "it has no W_enc"),
        (numbers(), "?layer=0&architecture=topk&k=0", "k must be a whole number from 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(client, weights, query, message):
    assert message in put(client, "saes", "one", npz(weights), query, status=422)


def test_a_form_without_weights_or_with_more_is_refused(client):
    for files in ({}, {"weights": (io.BytesIO(b"x"), "w"), "other": (io.BytesIO(b"x"), "o")}):
        text = put(client, "saes", "one", files, status=422, content_type="multipart/form-data")
        assert text.startswith("the form must have a file weights")
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n%b\r\n'
    for body in (part % b"" * 1001, part % bytes(600_000)):
        kind = "multipart/form-data; boundary=b"
        text = put(client, "saes", "one", body + b"--b--\r\n", status=422, content_type=kind)
        assert text.startswith("the form has too many parts, or one of them is large")


def test_a_feature_shows_where_it_is_strong_and_what_it_makes_likelier(client):
    put_form(client, "one")
    shown = client.get("/inspect/saes/one/features/3").get_json()
    assert 0 < shown["density"] <= 1
    assert shown["windows"][0]["values"][: len(shown["windows"][0]["tokens"])]
    peak = max(shown["windows"][0]["values"])
    assert peak >= shown["largest"] or shown["windows"][0]["position"] == 0
    assert len(shown["raised"]) == len(shown["lowered"]) == 10
    assert shown["raised"][0]["logit"] >= shown["raised"][-1]["logit"]
    assert shown["nearest"][0]["id"] != 3
    response = client.get(f"/inspect/saes/one/features/{FEATURES}")
    assert response.get_json()["detail"] == f"feature must be in [0, {FEATURES - 1}]"
    assert client.get("/inspect/saes/two/features/0").status_code == 404


def test_features_are_in_the_trace_of_every_token(client):
    put_form(client, "one")
    answer = completion(client, trace={"features": {"sae": "one", "topk": 2}})
    steps = answer["choices"][0]["trace"]["steps"]
    assert all(len(step["features"]) == 2 for step in steps)
    assert all(
        first["value"] >= second["value"] for first, second in (s["features"] for s in steps)
    )
    put(client, "saes", "mlp", npz(numbers()), "?part=mlp&layer=1")
    refused = completion(client, status=400, trace={"features": {"sae": "mlp"}})
    assert refused["error"]["param"] == "trace.features"
    refused = completion(client, status=404, trace={"features": {"sae": "none"}})
    assert "No sae 'none' in the store; there are: mlp, one" in refused["error"]["message"]


def test_a_feature_is_clamped_by_an_edit(client):
    put_form(client, "one")
    edit = {"do": "feature", "sae": "one", "feature": 3, "value": 40.0}
    plain, edited = completion(client, logprobs=1), completion(client, edit, logprobs=1)
    assert edited["choices"][0]["logprobs"] != plain["choices"][0]["logprobs"]
    assert edited["usage"]["intervene"]["places"] == 1
    traced = completion(client, edit, trace={"features": {"sae": "one", "topk": 1}})
    assert {s["features"][0]["id"] for s in traced["choices"][0]["trace"]["steps"]} == {3}
    values = [s["features"][0]["value"] for s in traced["choices"][0]["trace"]["steps"]]
    assert values == pytest.approx([40.0] * len(values), rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sae": "one"}, "feature is required for feature"),
        ({"sae": "one", "feature": 3}, "value is required for feature"),
        ({"sae": "one", "feature": 3, "value": 1, "layer": 0}, "layer is not for feature"),
        ({"sae": "one", "feature": FEATURES, "value": 1}, "feature must be in [0, 63]"),
        ({"do": "scale", "by": 2, "layer": 0, "sae": "one"}, "sae is for feature"),
    ],
)
def test_an_edit_of_a_feature_says_what_it_lacks(client, fields, message):
    put_form(client, "one")
    refused = completion(client, {"do": "feature", **fields}, status=400)
    assert message.replace("'", "") in refused["error"]["message"].replace("'", "")


# -- calibration


def test_other_texts_take_the_place_of_ours(client):
    url = "/inspect/calibration"
    assert client.get(url).get_json() == {"texts": [TEXT], "own": True}
    norms = client.get("/inspect/model").get_json()["resid_norm"]
    put_form(client, "one")
    texts = ["a", "Water boils.", ""]
    assert client.put(url, json={"texts": texts}).status_code == 422
    assert client.put(url, json={"texts": texts[:2]}).get_json() == {
        "texts": texts[:2],
        "own": False,
    }
    try:
        assert client.get("/inspect/model").get_json()["resid_norm"] != norms
        made = put_form(client, "one", status=200)
        assert made["tokens"] == 1 + len("Water boils.") - 1
        mean = {"do": "ablate", "part": "mlp", "layers": "all", "with": "mean"}
        ablated = completion(client, mean, logprobs=1)["choices"][0]["logprobs"]
    finally:
        assert client.delete(url).get_json() == {"deleted": True}
    assert completion(client, mean, logprobs=1)["choices"][0]["logprobs"] != ablated
    assert client.get("/inspect/model").get_json()["resid_norm"] == norms
    assert client.delete(url).get_json() == {"deleted": False}


def test_too_much_text_is_refused(client):
    response = client.put("/inspect/calibration", json={"texts": ["x" * 60_000] * 2})
    assert response.get_json()["detail"] == "texts have 120000 bytes (max 65536)"
