"""Folders of safetensors on their way into packed weights: tensor by tensor, with the same bits."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import random_weights, tiny_config
from tests.engine.models import prompts_of, tiny_model
from tests.engine.native.test_engine import bits, scored
from tests.engine.native.test_stored_weights import PEAK, SIZES
from tests.four_bits import of_four_bits
from tests.repeats import slow
from transformers_api.engine import loader
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native import convert_model
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.engine.safetensors_weights import SafetensorsWeights
from transformers_api.engine.stored_model import load_stored, stored_weights
from transformers_api.errors import ModelLoadFailed


@pytest.fixture
def load(engine_thread):
    engines = []

    def load(folder, **options):
        options = LoadOptions(**{"num_slots": 4, "prefill_chunk": 8} | options)
        engine = engine_thread.call(lambda: load_engine(folder, options, engine_thread)).result()
        engines.append(engine)
        return engine

    yield load
    for engine in engines:
        engine.close()


def answer(engine):
    return bits(engine.submit([scored(prompts_of(5)[4], 6)]))


def change(folder, what):
    path = folder / "model.safetensors"
    weights = load_file(path)
    what(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def load_whole(load, monkeypatch):
    """The same by transformers, which has all numbers in memory at once."""

    def load_whole(folder, **options):
        with monkeypatch.context() as patch:
            patch.setattr(loader, "stored_weights", lambda *_: None)
            return load(folder, **options)

    return load_whole


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt-oss-sinks", *slow("llama", "gpt-neox")])
def test_every_width_has_the_bits_of_a_model_that_was_in_memory(
    load, load_whole, native_cache, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(convert_model, "INT4_MOST_LOST", 1.0)  # of experts, too
    of_four_bits(tiny_model(name)).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for quantization in ("none", "int8", "int4"):
        options = {"native": native_cache, "quantization": quantization}
        streamed, whole = load(tmp_path, **options), load_whole(tmp_path, **options)
        facts = [replace(each.describe(), bytes=0) for each in (streamed, whole)]
        assert facts[0] == facts[1]
        assert facts[0].quantization == quantization
        assert answer(streamed) == answer(whole), quantization


@pytest.mark.parametrize(("name", "stored"), [("gemma3", torch.bfloat16), ("llama", torch.float16)])
def test_halves_have_the_bits_of_a_model_that_was_in_memory(
    load, load_whole, native_cache, tmp_path, name, stored
):
    copy.deepcopy(tiny_model(name)).to(stored).save_pretrained(tmp_path)
    for options in ({}, {"native": native_cache}, {"native": native_cache, "dtype": "float32"}):
        assert answer(load(tmp_path, **options)) == answer(load_whole(tmp_path, **options)), options


def test_models_that_are_unlike_others_run_on_the_kernels_too(
    load, load_whole, native_cache, tmp_path, caplog
):
    """Without a parameter that is not packed; with one that looks into its table of words."""
    for name in ("olmo", "gemma4", "youtu"):
        torch.manual_seed(0)
        model = random_weights(tf.AutoModelForCausalLM.from_config(tiny_config(name)))
        model.save_pretrained(tmp_path / name)
        with caplog.at_level(logging.INFO):
            streamed = load(tmp_path / name, native=native_cache)
        assert streamed.describe().kernels == "native"
        assert answer(streamed) == answer(load_whole(tmp_path / name, native=native_cache))
    assert "transformers empties the row of its padding" in caplog.text  # youtu's alone


def test_experts_that_the_files_have_one_by_one_become_one_layer(load, native_cache, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    model = innermost(load(tmp_path, native=native_cache).runner).model
    experts = model.model.layers[0].mlp.experts
    expected = tiny_model("mixtral").model.layers[0].mlp.experts
    for number in range(4):
        for packed, own in (
            (experts.packed_up, expected.gate_up_proj),
            (experts.packed_down, expected.down_proj),
        ):
            assert torch.equal(packed.weights[number].dense(), own[number])


@pytest.mark.parametrize("tie", ["both", "other", "different"])
def test_tied_weights_are_tied_as_far_as_the_files_allow(load, native_cache, tmp_path, tie):
    config = tf.LlamaConfig(**SIZES, tie_word_embeddings=True)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words, head = "model.embed_tokens.weight", "lm_head.weight"

    def other(weights):
        weights[head] = weights[words].clone() * (2 if tie == "different" else 1)
        if tie == "other":
            del weights[words]

    change(tmp_path, other)
    wanted = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (wanted.lm_head.weight is wanted.model.embed_tokens.weight) == (tie != "different")
    weights = SafetensorsWeights(tmp_path)
    plain = load_stored(tmp_path, weights, torch.float32, lambda m, own, kind: own.fill(m, kind))
    assert torch.equal(plain.model.embed_tokens.weight, wanted.model.embed_tokens.weight)
    assert torch.equal(plain.lm_head.weight, wanted.lm_head.weight)
    model = innermost(load(tmp_path, native=native_cache).runner).model
    packed = model.model.embed_tokens.packed, model.lm_head.joined.weight
    assert (packed[0] is packed[1]) == (tie != "different")
    assert torch.equal(packed[0].dense(), wanted.model.embed_tokens.weight)
    assert torch.equal(packed[1].dense(), wanted.lm_head.weight)


def test_weights_that_do_not_fit_are_refused_with_their_file(load, native_cache, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    cases = [
        (lambda weights: weights.pop(expert), r"gate_up_proj"),
        (lambda w: w.update({"model.layers.7.mlp.gate.weight": torch.ones(2)}), r"layers\.7"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"model\.safetensors.*\[3\]"),
    ]
    for what, message in cases:
        save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
        change(tmp_path, what)
        for native in (None, native_cache):
            with pytest.raises(ModelLoadFailed, match=message):
                load(tmp_path, native=native)


def test_code_of_a_models_own_is_loaded_by_transformers_and_the_log_says_so(tmp_path, caplog):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    assert stored_weights(tmp_path, trust_remote_code=False) is not None
    with caplog.at_level(logging.INFO):
        assert stored_weights(tmp_path, trust_remote_code=True) is None
    assert "loaded by transformers" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_no_crash(load, native_cache, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    engine = load(tmp_path, native=native_cache)
    before = answer(engine)
    (tmp_path / "model.safetensors").write_bytes(b"")  # whoever maps it still would not survive
    assert answer(engine) == before


@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        (tf.LlamaConfig, "int8"),
        *slow((tf.LlamaConfig, "none"), (tf.MixtralConfig, "int4"), (tf.LlamaConfig, None)),
    ],
)
def test_a_load_takes_little_more_memory_than_what_is_served(
    tmp_path, native_cache, config, quantization
):
    experts = {"num_local_experts": 4, "intermediate_size": 2048}
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    sizes = SIZES | wide | {"vocab_size": 30_000} | (experts if "Mix" in config.__name__ else {})
    torch.manual_seed(0)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config(**sizes), dtype=torch.bfloat16)
    model = of_sixteen_levels(model.to_empty(device="cpu"))
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    del model
    native = native_cache if quantization else "-"
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(native), quantization or "none"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert child.returncode == 0, child.stderr
    served, taken = map(int, child.stdout.split())
    assert served > 120 << 20
    # MKL's form of a matrix, without the kernels, has some percent more than its numbers: how much
    # depends on the processor.
    most = 1.1 if quantization else 1.15
    assert taken < most * served + (150 << 20)


def of_sixteen_levels(model):
    """Weights that four bits can say."""
    row = (torch.randint(-8, 8, (99_991,)) / 256).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            parameter.copy_(row.repeat(-(-count // len(row)))[:count].view_as(parameter))
    return model
