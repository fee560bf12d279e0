"""Quantised models over HTTP: by setting and by registry entry, told, looked into, refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tokenizers
from tests.four_bits import of_four_bits
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

PROMPT = "The capital of France is"
WIDTHS = {
    "none": 16,
    "int8": 8.5,
    "int4": 5,
}  # bits of a weight; the output layer is another matter


def save_model(folder, make):
    torch.manual_seed(0)
    tokenizer = tokenizers.byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    make(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    save_model(folder / "four", of_four_bits)
    save_model(folder / "full", lambda model: model)
    plain = {"path": "four", "dtype": "bfloat16"}
    entries = [
        {"name": "own", "path": "four"},
        *({**plain, "name": kind, "quantization": kind} for kind in WIDTHS),
        {"name": "too-fine", "path": "full", "quantization": "int4"},
    ]
    (folder / "models.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def start(folder, native_cache):
    apps = []

    def make(**options):
        settings = {
            "native_kernels": True,
            "native_cache": native_cache,
            "model_registry_path": folder / "models.json",
            "include_default_models": False,
            "default_model": "own",
            "preload_model": False,
            "model_store": folder / "store",
            "hf_home": folder / "hub",
            "torch_threads": 1,
            "rate_limit_per_min": 0,
            **options,
        }
        apps.append(create_app(Settings(**settings)))
        return apps[-1].test_client()

    yield make
    for app in apps:
        app.extensions[EXTENSION].swapper.close()


@pytest.fixture(scope="module")
def client(start):
    return start()


def complete(client, model, **fields):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


def resident(client):
    return client.get("/status").get_json()["resident"]


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_registry_entry_says_how_wide_weights_are_and_clients_are_told(client, kind):
    assert complete(client, kind).status_code == 200
    seen = resident(client)
    assert (seen["model"], seen["quantization"], seen["dtype"]) == (kind, kind, "bfloat16")
    assert seen["kernels"] == "native"
    shown = client.get(f"/v1/models/{kind}").get_json()
    assert shown["quantization"] == shown["metadata"]["quantization"] == kind


def test_narrow_weights_take_as_many_bytes_as_they_have_bits(client):
    sizes = {}
    for kind in WIDTHS:
        complete(client, kind)
        sizes[kind] = resident(client)["bytes"]
    layers = 3 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)  # q, k, v; o; the feed-forward
    head = 64 * -(-len(tokenizers.byte_level()) // 32) * 32
    norms = 7 * 64 * 4
    for kind, bits in WIDTHS.items():
        head_bits = min(16, max(bits, 8.5))
        assert sizes[kind] == layers * bits / 8 + head * head_bits / 8 + norms


def test_the_setting_holds_for_entries_that_say_nothing(start):
    client = start(quantization="int8")
    fingerprints = set()
    for name, kind in (("own", "int8"), ("none", "none"), ("int4", "int4")):
        fingerprints.add(complete(client, name).get_json()["system_fingerprint"])
        assert resident(client)["quantization"] == kind
    assert len(fingerprints) == 3


def test_answers_are_near_those_of_the_wide_weights(client):
    found = {}
    for kind in WIDTHS:
        body = complete(client, kind, max_tokens=1, logprobs=1).get_json()
        found[kind] = body["choices"][0]["logprobs"]["token_logprobs"][0]
    assert found["int8"] == pytest.approx(found["none"], abs=0.1)
    assert found["int4"] == pytest.approx(found["none"], abs=0.1)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_can_be_looked_into(client, kind):
    plain = complete(client, kind, return_token_ids=True).get_json()["choices"][0]
    traced = complete(client, kind, return_token_ids=True, trace={"layers": [1]}).get_json()
    assert traced["choices"][0]["token_ids"] == plain["token_ids"]
    model = client.get(f"/inspect/model?model={kind}").get_json()
    assert model["attention"]["verified"] is True
    assert model["gradients"] is True
    for route, fields in (
        ("full_attn", {"trace_layer": 1, "head": 0}),
        ("logit_lens", {"topk": 1}),
        ("attribution", {}),
        ("hidden_states", {"layers": [1]}),
    ):
        asked = {"model": kind, "prompt": PROMPT, **fields}
        answer = client.post(f"/inspect/{route}", json=asked)
        assert answer.status_code == 200, answer.get_data(as_text=True)


def test_a_small_model_that_int4_would_change_is_refused_by_name(client):
    answer = complete(client, "too-fine")
    error = answer.get_json()["error"]
    assert (answer.status_code, error["code"]) == (503, "model_load_failed")
    assert error["param"] == "quantization"
    assert "it would change the weights by" in error["message"]
    assert complete(client, "int8").status_code == 200


def test_without_the_kernels_an_entry_is_refused_and_not_served_in_another_way(start):
    client = start(native_kernels=False)
    error = complete(client, "int8").get_json()["error"]
    assert error["param"] == "quantization"
    assert "it needs NATIVE_KERNELS=true" in error["message"]
    assert complete(client, "none").status_code == 200
