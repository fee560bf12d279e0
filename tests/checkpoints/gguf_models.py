"""Tiny GGUF files of every architecture, with random weights under the names of transformers' map.

``state_dict`` builds a model's weights from ``weights.json`` with the ``gguf`` package alone: the
definition of that table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

VOCABULARY, WIDTH, HEADS, KV_HEADS, INNER, LAYERS, WINDOW = 64, 32, 4, 2, 96, 2, 256
HEAD = WIDTH // HEADS
COMMON = {
    "block_count": LAYERS,
    "context_length": WINDOW,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": WINDOW,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
# GGUF's architecture -> (model_type, its sizes besides SIZES, metadata besides COMMON)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-5}, {"rope.dimension_count": HEAD}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2moe": (
        "qwen2_moe",
        MOE | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        EXPERTS | {"expert_feed_forward_length": 1408, "expert_shared_feed_forward_length": 5632},
    ),
    "qwen3": ("qwen3", {"head_dim": 128}, {"attention.key_length": 128}),
    "qwen3moe": (
        "qwen3_moe",
        MOE | {"head_dim": 16, "moe_intermediate_size": 768},
        EXPERTS | {"attention.key_length": 16, "expert_feed_forward_length": 768},
    ),
    "gemma2": ("gemma2", {"head_dim": 16}, {"attention.key_length": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16}, {"attention.key_length": 16}),
    "phi3": ("phi3", {"pad_token_id": None}, {"rope.dimension_count": HEAD}),
    "gpt2": ("gpt2", {"max_position_embeddings": 1024}, LAYER_NORM | {"feed_forward_length": 128}),
    "bloom": ("bloom", {}, LAYER_NORM),
    "falcon": ("falcon", {"num_kv_heads": 1}, LAYER_NORM | {"attention.head_count_kv": 1}),
    "mamba": (
        "mamba",
        {"intermediate_size": 64, "state_size": 8, "conv_kernel": 4, "time_step_rank": 4},
        {
            "ssm.conv_kernel": 4,
            "ssm.state_size": 8,
            "ssm.time_step_rank": 4,
            "ssm.inner_size": 64,
            "feed_forward_length": 0,
            "attention.head_count": 0,
        },
    ),
    "starcoder2": ("starcoder2", {}, LAYER_NORM),
    "stablelm": ("stablelm", {"use_qkv_bias": True}, LAYER_NORM | {"rope.dimension_count": 2}),
    "nemotron": ("nemotron", {"head_dim": HEAD}, LAYER_NORM | {"rope.dimension_count": 4}),
    "lfm2": (
        "lfm2",
        {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
        {"attention.head_count_kv": [0, KV_HEADS], "shortconv.l_cache": 3},
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 32},
        EXPERTS
        | {
            "expert_feed_forward_length": 32,
            "feed_forward_length": 32,
            "attention.key_length": 16,
            "attention.sliding_window": 128,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
    ),
}


def tensors(architecture: str, seed: int = 0, *, tied: bool = True) -> dict[str, numpy.ndarray]:
    """Random tensors as llama.cpp's converter lays them out for a tiny model."""
    model_type, sizes, _ = MODELS[architecture]
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
        model = AutoModelForCausalLM.from_config(config)
    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    names = get_gguf_hf_weights_map(model, kind(config=config.to_dict()))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    random, made = numpy.random.default_rng(seed), dict[str, numpy.ndarray]()
    for name, ours in names.items():
        shape, file_name = shapes[ours], name
        if tied and name == "output.weight":
            continue
        if ours.endswith(("experts.gate_up_proj", "experts.down_proj")):
            file_name = name if name.endswith(".weight") else f"{name}.weight"
            if ours.endswith("gate_up_proj"):
                shape = (shape[0], shape[1] // 2, shape[2])
        elif architecture == "gpt2" and len(shape) == 2 and "embd" not in name:
            shape = shape[::-1] if name != "output.weight" else shape
        elif "conv1d.weight" in name or "shortconv.conv.weight" in name:
            shape = (shape[0], shape[2])
        elif "ffn_gate_inp_shexp" in name:
            shape = shape[1:]
        values = random.standard_normal(shape).astype(numpy.float32) / math.sqrt(shape[-1])
        made[file_name] = -numpy.exp(values) if name.endswith("ssm_a") else values
    if architecture == "gpt-oss":
        made |= _gpt_oss_experts(random)
    return made


def _gpt_oss_experts(random: Any) -> dict[str, numpy.ndarray]:
    """Those that transformers' own map does not know."""
    shapes = {
        **{f"ffn_{which}_exps.weight": (4, 32, WIDTH) for which in ("gate", "up")},
        **{f"ffn_{which}_exps.bias": (4, 32) for which in ("gate", "up")},
        "ffn_down_exps.weight": (4, WIDTH, 32),
        "ffn_down_exps.bias": (4, WIDTH),
    }
    return {
        f"blk.{layer}.{name}": random.standard_normal(shape).astype(numpy.float32)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


def write(
    path: Path,
    architecture: str,
    weights: Mapping[str, numpy.ndarray],
    metadata: Mapping[str, Any] | None = None,
    types: Mapping[str, str] | None = None,
    *,
    whole: bool = True,
    without: str = " ",
) -> Path:
    """A GGUF file. ``types``: of tensors that are to be quantised. ``whole``: with a vocabulary.

    ``without``: the end of a key to be left out.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    own = {**COMMON, **MODELS[architecture][2]} if architecture in MODELS else {}
    if whole:
        _add_vocabulary(writer)
        for key, value in own.items():
            if not key.endswith(without):
                _add(writer, f"{architecture}.{key}", value)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, values in weights.items():
        if (kind := (types or {}).get(name)) is None:
            writer.add_tensor(name, values)
            continue
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_parts(folder: Path, architecture: str, weights: Mapping[str, Any]) -> list[Path]:
    """The same in three files, named and numbered as llama-gguf-split does."""
    names, parts = list(weights), []
    for number in range(3):
        split = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        path = folder / f"m-{number + 1:05d}-of-00003.gguf"
        own = {name: weights[name] for name in names[number::3]}
        parts.append(write(path, architecture, own, split, whole=number == 0))
    return parts


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = ["<|end|>", *(chr(33 + index) for index in range(VOCABULARY - 2)), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that ``weights.json`` of a folder describes, in float32."""
    table = json.loads((folder / "weights.json").read_text())
    assert table["version"] == 1
    files = [numpy.memmap(file["path"], mode="r", dtype=numpy.uint8) for file in table["files"]]
    made = {}
    for name, parameter in table["tensors"].items():
        parts = [_part(files[part["file"]], part) for part in parameter["parts"]]
        join, whole = parameter["join"], parts[0]
        if join is not None and join.get("interleave"):
            whole = torch.stack(parts, dim=join["dim"] + 1).flatten(join["dim"])
        elif join is not None:
            whole = torch.cat(parts, dim=join["dim"])
        assert list(whole.shape) == parameter["shape"], name
        made[name] = whole
    return made


def _part(file: numpy.ndarray, part: Mapping[str, Any]) -> torch.Tensor:
    start, shape = part["offset"], part["shape"]
    data = file[start : start + part["bytes"]]
    kind = gguf.GGMLQuantizationType[part["type"]]
    if part["type"] in ("F32", "F16"):
        data = data.view({"F32": numpy.float32, "F16": numpy.float16}[part["type"]])
        values = data.astype(numpy.float32)
    else:
        values = gguf.dequantize(data.reshape(math.prod(shape[:-1]), -1), kind)
    tensor = torch.from_numpy(numpy.ascontiguousarray(values)).reshape(shape)
    for op in part["ops"]:
        tensor = _apply(op, tensor)
    return tensor


def _apply(op: Mapping[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    match op["op"]:
        case "heads":
            pairs = tensor.reshape(op["heads"], -1, 2, *tensor.shape[1:])
            return pairs.swapaxes(1, 2).reshape(tensor.shape)
        case "bloom_qkv":
            split = tensor.reshape(3, op["heads"], -1, *tensor.shape[1:])
            return split.swapaxes(0, 1).reshape(tensor.shape)
        case "transpose":
            return tensor.transpose(-2, -1)
        case "add":
            return tensor + op["value"]
        case "unsqueeze":
            return tensor.unsqueeze(op["dim"])
        case "log_neg":
            return torch.log(-tensor)
    raise AssertionError(op)
