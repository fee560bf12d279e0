"""Mixtures of experts in GGUF files: an expert at a time, in the file's own width."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.checkpoints import gguf_models
from tests.engine.native.test_stored_weights import (  # noqa: F401
    PEAK,
    first_logprob,
    load,
    plain_logprob,
)
from tests.repeats import slow
from transformers_api.checkpoints.sidecar import write_sidecar
from transformers_api.engine.runners.model_runner import innermost

PROMPT = [3, 9, 27, 5, 11]
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
LARGEST = 0.05  # of a log probability


def prepared(tmp_path, architecture, kinds):
    """The sidecar of a file with experts of these types."""
    weights = gguf_models.tensors(architecture)
    types = {
        name: kinds[name.split(".")[2]]
        for name in weights
        if name.split(".")[2:3] and name.split(".")[2] in kinds and name.endswith("weight")
    }
    file = gguf_models.write(tmp_path / "m.gguf", architecture, weights, types=types)
    write_sidecar(file, tmp_path / "sidecar", lambda share, what: None)
    return tmp_path / "sidecar"


def experts_of(engine):
    model = innermost(engine.runner).model
    return [m for m in model.modules() if hasattr(m, "packed_up")]


@pytest.mark.parametrize(
    ("architecture", "kinds", "bits"),
    [
        ("qwen3moe", dict.fromkeys(EXPERTS, "Q4_0"), (4.5, 4.5)),
        ("qwen3moe", {"ffn_gate_exps": "Q8_0", "ffn_up_exps": "Q4_1"}, (8.5, 16.0)),
        ("qwen3moe", {}, (32.0, 32.0)),
        *slow(
            ("qwen2moe", dict.fromkeys(EXPERTS, "Q8_0"), (8.5, 8.5)),
            ("gpt-oss", dict.fromkeys(EXPERTS, "Q8_0"), (8.5, 8.5)),
        ),
        ("gpt-oss", dict.fromkeys(EXPERTS, "MXFP4"), (8.5, 8.5)),
        ("gpt-oss", {"ffn_down_exps": "Q4_0"}, (16.0, 4.5)),
    ],
)
def test_experts_of_a_file_are_served_in_its_width(
    load,  # noqa: F811
    tmp_path,
    native_cache,
    architecture,
    kinds,
    bits,
):
    sidecar = prepared(tmp_path, architecture, kinds)
    plain = load(sidecar)
    assert plain.describe().kernels == "torch"
    expected = first_logprob(plain, PROMPT)
    engine = load(sidecar, native=native_cache)
    assert engine.describe().kernels == "native"
    assert first_logprob(engine, PROMPT) == pytest.approx(expected, abs=LARGEST)
    layers = experts_of(engine)
    assert layers
    for layer in layers:
        made = tuple(
            8 * packed.nbytes / (packed.out_features * packed.in_features)
            for packed in (layer.packed_up, layer.packed_down)
        )
        assert made == bits


def mixtral_tensors(model):
    """As llama.cpp's converter lays them out: a llama with experts, rotated halves alternating."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    made = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in state.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        gate, up = numpy.split(own["mlp.experts.gate_up_proj"], 2, axis=1)
        tensors = {
            "attn_norm": own["input_layernorm.weight"],
            "ffn_norm": own["post_attention_layernorm.weight"],
            "attn_q": alternating(own["self_attn.q_proj.weight"], gguf_models.HEADS),
            "attn_k": alternating(own["self_attn.k_proj.weight"], gguf_models.KV_HEADS),
            "attn_v": own["self_attn.v_proj.weight"],
            "attn_output": own["self_attn.o_proj.weight"],
            "ffn_gate_inp": own["mlp.gate.weight"],
            "ffn_gate_exps": gate,
            "ffn_up_exps": up,
            "ffn_down_exps": own["mlp.experts.down_proj"],
        }
        made |= {f"blk.{layer}.{name}.weight": value for name, value in tensors.items()}
    return made


def alternating(weight, heads):
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape).copy()


def test_a_mixtral_file_says_what_the_model_says_that_it_was_made_of(
    load,  # noqa: F811
    tmp_path,
    native_cache,
):
    torch.manual_seed(3)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = MixtralConfig(**gguf_models.SIZES, **sizes, initializer_range=0.3)
    model = MixtralForCausalLM(config).eval()
    keys = {"llama.expert_count": 4, "llama.expert_used_count": 2}
    file = gguf_models.write(tmp_path / "m.gguf", "llama", mixtral_tensors(model), keys)
    write_sidecar(file, tmp_path / "sidecar", lambda share, what: None)
    expected = pytest.approx(plain_logprob(model, PROMPT), abs=1e-4)
    assert first_logprob(load(tmp_path / "sidecar"), PROMPT) == expected
    engine = load(tmp_path / "sidecar", native=native_cache)
    assert engine.describe().kernels == "native"
    assert first_logprob(engine, PROMPT) == expected
    assert experts_of(engine)


@pytest.mark.slow  # as the other peaks
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_a_mixture_takes_little_more_memory_than_its_packed_weights(
    tmp_path, native_cache, monkeypatch, kind
):
    wide = {"num_experts": 64, "moe_intermediate_size": 768, "head_dim": 16}
    more = {"expert_count": 64, "expert_feed_forward_length": 768}
    kind_of, sizes, keys = gguf_models.MODELS["qwen3moe"]
    monkeypatch.setitem(gguf_models.MODELS, "qwen3moe", (kind_of, sizes | wide, keys | more))
    monkeypatch.setattr(gguf_models, "WIDTH", 512)
    monkeypatch.setitem(gguf_models.SIZES, "hidden_size", 512)
    monkeypatch.setitem(gguf_models.COMMON, "embedding_length", 512)
    sidecar = prepared(tmp_path, "qwen3moe", dict.fromkeys(EXPERTS, kind))
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(sidecar), str(native_cache), "gguf"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert child.returncode == 0, child.stderr
    packed, taken = map(int, child.stdout.split())
    assert 80 << 20 < packed < 200 << 20  # 600 MB as float32
    assert taken < 1.1 * packed + (150 << 20)
