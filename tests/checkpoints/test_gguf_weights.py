"""``weights.json`` against the weights that transformers itself loads from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import gguf_models
from transformers_api.checkpoints.sidecar import write_sidecar
from transformers_api.engine.gguf_weights import GgufWeights
from transformers_api.errors import ModelLoadFailed

OURS_ALONE = {"gpt-oss"}  # transformers reads none that llama.cpp has written
# What transformers takes from its class where the file says something else.
MENDED = {
    "gemma2": {"query_pre_attn_scalar"},
    "gemma3": {"query_pre_attn_scalar"},
    "falcon": {"num_kv_heads", "tie_word_embeddings"},
    "bloom": {"tie_word_embeddings"},
}


def sidecar(source: Path, folder: Path) -> Path:
    write_sidecar(source, folder, lambda share, what: None)
    return folder


def model_of(folder: Path) -> Any:
    """The model of a sidecar with the weights of its table: nothing is left over or missing."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    missing, unexpected = model.load_state_dict(gguf_models.state_dict(folder), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", sorted(set(gguf_models.MODELS) - OURS_ALONE))
def test_weights_and_config_are_those_that_transformers_loads(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    weights = gguf_models.tensors(architecture, tied=tied)
    source = gguf_models.write(tmp_path / "m.gguf", architecture, weights)
    folder = sidecar(source, tmp_path / "sidecar")
    ours = model_of(folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)
    expected, written = theirs.config.to_dict(), json.loads((folder / "config.json").read_text())
    mended = {"quantization_config", "architectures", "dtype", *MENDED.get(architecture, ())}
    for name in set(written) - mended:
        assert written[name] == expected[name], name
    assert written["architectures"] == [type(theirs).__name__]


@pytest.mark.parametrize("architecture", sorted(gguf_models.MODELS))
def test_the_engine_reads_the_same_weights(architecture: str, tmp_path: Path) -> None:
    weights = gguf_models.tensors(architecture)
    folder = sidecar(
        gguf_models.write(tmp_path / "m.gguf", architecture, weights), tmp_path / "sidecar"
    )
    stored, expected = GgufWeights(folder), gguf_models.state_dict(folder)
    assert list(stored.names) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(stored.dense(name, torch.float32), weight), name
    assert sum(stored.types.values()) == sum(weight.numel() for weight in expected.values())


def test_experts_of_gpt_oss_alternate_and_multiply_from_the_left(tmp_path: Path) -> None:
    weights = gguf_models.tensors("gpt-oss")
    folder = sidecar(
        gguf_models.write(tmp_path / "m.gguf", "gpt-oss", weights), tmp_path / "sidecar"
    )
    state = model_of(folder).state_dict()
    gate_up = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[2, :, 6], torch.tensor(weights["blk.1.ffn_gate_exps.weight"][2, 3]))
    assert torch.equal(gate_up[2, :, 7], torch.tensor(weights["blk.1.ffn_up_exps.weight"][2, 3]))
    down = state["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(down[2, :, 5], torch.tensor(weights["blk.1.ffn_down_exps.weight"][2, 5]))
    bias = state["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert bias[3, 9] == weights["blk.1.ffn_up_exps.bias"][3, 4]
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["truncate"]) == ("yarn", 32.0, False)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_quantised_tensors_stay_where_they_lie(kind: str, tmp_path: Path) -> None:
    weights = gguf_models.tensors("llama")
    types = {name: kind for name, values in weights.items() if values.ndim == 2}
    source = gguf_models.write(tmp_path / "m.gguf", "llama", weights, types=types)
    folder = sidecar(source, tmp_path / "sidecar")
    table = json.loads((folder / "weights.json").read_text())
    [part] = table["tensors"]["model.layers.1.self_attn.k_proj.weight"]["parts"]
    number = gguf.GGMLQuantizationType[kind]
    stored = gguf.quantize(weights["blk.1.attn_k.weight"], number).tobytes()
    assert part["type"] == kind
    assert part["ops"] == [{"op": "heads", "heads": gguf_models.KV_HEADS}]
    assert source.read_bytes()[part["offset"] : part["offset"] + part["bytes"]] == stored
    assert not list(folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000


@pytest.mark.parametrize("named", [1, 2, 3])
def test_a_model_in_parts_is_read_by_any_of_them(named: int, tmp_path: Path) -> None:
    weights = gguf_models.tensors("llama")
    whole = gguf_models.write(tmp_path / "whole.gguf", "llama", weights)
    parts = gguf_models.write_parts(tmp_path, "llama", weights)
    folders = [sidecar(whole, tmp_path / "a"), sidecar(parts[named - 1], tmp_path / "b")]
    one, other = map(gguf_models.state_dict, folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    table = json.loads((folders[1] / "weights.json").read_text())
    assert [file["path"] for file in table["files"]] == [str(part.resolve()) for part in parts]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = gguf_models.write_parts(tmp_path, "llama", gguf_models.tensors("llama"))
    parts[1].unlink()
    with pytest.raises(ModelLoadFailed, match=r"m-00002-of-00003\.gguf is missing"):
        sidecar(parts[0], tmp_path / "sidecar")


def test_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    parts = gguf_models.write_parts(tmp_path, "llama", gguf_models.tensors("llama"))
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelLoadFailed, match=r"00002-of-00003.*split\.no is 2"):
        sidecar(parts[0], tmp_path / "sidecar")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"blk.1.ffn_up.weight": None}, r"is model\.layers\.1\.mlp\.up_proj", id="one"),
        pytest.param({"output_norm.weight": None}, r"is model\.norm\.weight", id="norm"),
        pytest.param(
            {"blk.0.attn_q.weight": numpy.zeros((16, 32), numpy.float32)},
            r"blk\.0\.attn_q\.weight has the shape \[16, 32\]",
            id="shape",
        ),
        pytest.param(
            {"blk.0.attn_q_norm.weight": numpy.zeros(8, numpy.float32)},
            r"blk\.0\.attn_q_norm\.weight has no place in LlamaForCausalLM",
            id="surplus",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    weights = gguf_models.tensors("llama") | change
    whole = {name: values for name, values in weights.items() if values is not None}
    source = gguf_models.write(tmp_path / "m.gguf", "llama", whole)
    with pytest.raises(ModelLoadFailed, match=rf"m\.gguf: .*{reason}"):
        sidecar(source, tmp_path / "sidecar")
    assert not (tmp_path / "sidecar").exists()


@pytest.mark.parametrize(
    "architecture", ["rwkv6", "command-r", "deepseek2", "t5", "general", "qwen35", "qwen35moe"]
)
def test_an_architecture_that_cannot_be_read_is_named(architecture: str, tmp_path: Path) -> None:
    weights = {"token_embd.weight": numpy.zeros((64, 32), numpy.float32)}
    source = gguf_models.write(tmp_path / "m.gguf", architecture, weights)
    with pytest.raises(ModelLoadFailed, match=rf"the architecture '{architecture}'"):
        sidecar(source, tmp_path / "sidecar")


def test_a_falcon_whose_heads_lie_otherwise_is_refused(tmp_path: Path) -> None:
    weights = gguf_models.tensors("falcon")
    heads = {"falcon.attention.head_count_kv": 2}
    source = gguf_models.write(
        tmp_path / "m.gguf", "falcon", weights, heads, without="attention.head_count_kv"
    )
    with pytest.raises(ModelLoadFailed, match="falcon with several heads of keys"):
        sidecar(source, tmp_path / "sidecar")


def test_biases_of_attention_are_read_where_the_file_has_them(tmp_path: Path) -> None:
    weights = gguf_models.tensors("llama")
    random = numpy.random.default_rng(1)
    for name in [name for name in weights if "attn_" in name and "norm" not in name]:
        rows = weights[name].shape[0]
        bias = random.standard_normal(rows).astype(numpy.float32)
        weights[name.replace("weight", "bias")] = bias
    source = gguf_models.write(tmp_path / "m.gguf", "llama", weights)
    state = model_of(sidecar(source, tmp_path / "sidecar")).state_dict()
    bias = torch.tensor(weights["blk.0.attn_q.bias"]).reshape(gguf_models.HEADS, -1, 2)
    assert torch.equal(state["model.layers.0.self_attn.q_proj.bias"], bias.mT.reshape(-1))


def test_heads_of_keys_are_those_of_queries_where_the_file_says_nothing(tmp_path: Path) -> None:
    weights = gguf_models.tensors("llama")
    for layer in range(gguf_models.LAYERS):
        for name in ("attn_k", "attn_v"):
            weights[f"blk.{layer}.{name}.weight"] = weights[f"blk.{layer}.attn_q.weight"]
    source = gguf_models.write(tmp_path / "m.gguf", "llama", weights, without="head_count_kv")
    state = model_of(sidecar(source, tmp_path / "sidecar")).state_dict()
    layer = "model.layers.0.self_attn"
    assert torch.equal(state[f"{layer}.k_proj.weight"], state[f"{layer}.q_proj.weight"])
