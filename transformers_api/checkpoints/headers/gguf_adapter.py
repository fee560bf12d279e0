"""A LoRA adapter in a GGUF file, as llama.cpp's converter writes it: which matrices, for what.

``general.type`` is "adapter", ``adapter.type`` "lora"; for each weight of the base that it changes,
such as blk.0.attn_q.weight, there are ``….lora_a`` (rank, in) and ``….lora_b`` (out, rank).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.gguf_file import (
    GgufHeader,
    GgufTensor,
    read_gguf_header,
)
from transformers_api.errors import ModelLoadFailed

# Architectures whose rows lie as in transformers, or in an order that is known here.
_AS_THEY_ARE = (
    *("gemma", "gemma2", "gemma3", "gpt-oss", "lfm2", "mamba", "nemotron", "phi2", "phi3"),
    *("qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2"),
)
_IN_PAIRS = "llama"  # its rotated rows lie in pairs
ARCHITECTURES = (_IN_PAIRS, *_AS_THEY_ARE)
_PART = re.compile(r"(.+)\.weight\.lora_([ab])")
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class GgufAdapter:
    """``layers``: the tensors a and b of each layer, by ggml's name of it (blk.0.attn_q)."""

    architecture: str
    alpha: float
    layers: Mapping[str, tuple[GgufTensor, GgufTensor]]

    def scale(self, layer: str) -> float:
        """The factor of a layer's product, as llama.cpp has it: 1 where the file says nothing."""
        return self.alpha / self.layers[layer][0].shape[0] if self.alpha else 1.0


def is_gguf_adapter(header: GgufHeader) -> bool:
    """True for the header of an adapter, which is no model."""
    return header.metadata.get("general.type") == "adapter"


def read_model_header(path: Path) -> GgufHeader:
    """The header of a model. Raises ModelLoadFailed, for an adapter too."""
    header = read_gguf_header(path)
    if is_gguf_adapter(header):
        raise ModelLoadFailed(
            f"{path.name} is an adapter, no model: give it a registry entry with adapter and base"
        )
    return header


def read_gguf_adapter(path: Path) -> GgufAdapter:
    """The adapter in a file. Raises ModelLoadFailed, naming the key or the tensor."""
    header = read_gguf_header(path)
    metadata, where = header.metadata, path.name
    if not is_gguf_adapter(header):
        kind = metadata.get("general.type", "model")
        raise ModelLoadFailed(f"{where}: general.type is {str(kind)[:50]!r}, and no adapter")
    if (kind := metadata.get("adapter.type")) != "lora":
        raise ModelLoadFailed(f"{where}: adapter.type is {str(kind)[:50]!r}, only lora is served")
    if metadata.get("adapter.alora.invocation_tokens"):
        raise ModelLoadFailed(
            f"{where}: adapter.alora.invocation_tokens: it is active from certain tokens on only"
        )
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ModelLoadFailed(
            f"{where}: general.architecture is {architecture[:50]!r}, whose adapters cannot be "
            "read; take the folder that it was made from"
        )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ModelLoadFailed(f"{where}: adapter.lora.alpha is {str(alpha)[:50]}, no finite number")
    return GgufAdapter(architecture, alpha, _layers(where, header))


def _layers(where: str, header: GgufHeader) -> dict[str, tuple[GgufTensor, GgufTensor]]:
    parts: dict[str, dict[str, GgufTensor]] = {}
    for tensor in header.tensors:
        match = _PART.fullmatch(tensor.name)
        if match is None:
            raise ModelLoadFailed(f"{where}: {tensor.name} is no matrix of an adapter")
        if match[1].endswith(("token_embd", "_exps")):
            raise ModelLoadFailed(
                f"{where}: {tensor.name}: adapters of embeddings and experts cannot be applied"
            )
        if len(tensor.shape) != 2:
            raise ModelLoadFailed(
                f"{where}: {tensor.name} has the shape {list(tensor.shape)}, which is no matrix's"
            )
        parts.setdefault(match[1], {})[match[2]] = tensor
    if not parts:
        raise ModelLoadFailed(f"{where} holds no tensors")
    layers = {}
    for layer, own in parts.items():
        for part in "ab":
            if part not in own:
                raise ModelLoadFailed(f"{where}: {layer}.weight.lora_{part} is missing")
        if own["a"].shape[0] != own["b"].shape[1]:
            raise ModelLoadFailed(
                f"{where}: {layer} has rank {own['a'].shape[0]} in lora_a and "
                f"{own['b'].shape[1]} in lora_b"
            )
        layers[layer] = own["a"], own["b"]
    return layers


def read_numbers(path: Path, tensor: GgufTensor) -> Any:
    """A tensor of a file as a numpy array of float32."""
    import gguf
    import numpy

    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = numpy.frombuffer(file.read(tensor.bytes), numpy.uint8)
    kind = gguf.GGMLQuantizationType(tensor.kind)
    rows = data.reshape(tensor.shape[0], -1)
    return gguf.dequantize(rows, kind).reshape(tensor.shape).astype(numpy.float32)


def ggml_names(architecture: str, names: Iterable[str]) -> dict[str, str]:
    """``names`` of parameters, as transformers has them, by ggml's names of their layers."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], 1)  # all layers have the same names
    made: dict[str, str] = {}
    for name in names:
        stem = name.removesuffix(".weight")
        number = _BLOCK.search(stem)
        inner = _BLOCK.sub("0", stem, count=1)
        parts = inner.split(".")
        for depth in range(min(len(parts), 3)):
            if mapped := table.get_name(".".join(parts[depth:])):
                if number is not None:
                    mapped = mapped.replace("blk.0.", f"blk.{number[0]}.", 1)
                made.setdefault(mapped, name)
                break
    return made


def row_heads(architecture: str, layer: str, config: Any) -> int | None:
    """The heads whose rows lie in pairs in ``lora_b`` of a layer; None: rows lie as they are."""
    if architecture != _IN_PAIRS:
        return None
    if layer.endswith(".attn_q"):
        return int(config.num_attention_heads)
    if layer.endswith(".attn_k"):
        return int(config.num_key_value_heads)
    return None
