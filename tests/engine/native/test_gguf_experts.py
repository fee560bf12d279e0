"""Mixtures of experts in GGUF files: an expert at a time, in the file's own width."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.checkpoints import gguf_models
from tests.engine.native.test_stored_weights import PEAK, first_logprob, load  # noqa: F401
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
