"""The description of a model from its files' headers alone: its shape, its number of weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.gguf_file import read_gguf_header
from transformers_api.checkpoints.headers.originals import CONFIGS, WRAPPERS, shape_of
from transformers_api.checkpoints.headers.pickled_file import Shape, read_pickled
from transformers_api.checkpoints.headers.safetensors_file import read_header
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import read_object
from transformers_api.serving.models.preflight import is_original, weight_files
from transformers_api.serving.models.quantized_files import quantized_types
from transformers_api.serving.models.sidecars import is_sidecar, read_stored_tensors

# TinyGPT's words -> those of a GGUF file's metadata, after the name of its architecture
_GGUF = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "embedding_length",
    "n_head": "attention.head_count",
    "n_layer": "block_count",
    "n_experts": "expert_count",
    "top_experts": "expert_used_count",
}


@dataclass(frozen=True, slots=True)
class Description:
    """A model's configuration, as its files or TinyGPT name the fields, and its weights."""

    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None


def describe(path: Path) -> Description:
    """The description of a folder, or of a file to convert; empty for what cannot be read."""
    try:
        stats = [each.stat() for each in (path, path.with_name("config.json")) if each.exists()]
        return _describe(path, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))
    except (ModelLoadFailed, OSError):
        return Description()


@functools.lru_cache(maxsize=256)  # a list of models asks for all of them
def _describe(path: Path, stamp: tuple[tuple[int, int], ...]) -> Description:
    if path.is_dir():
        return _folder(path)
    return _gguf(path) if path.suffix == ".gguf" else _pickled(path)


def _folder(folder: Path) -> Description:
    config = read_object(folder / "config.json")
    if is_sidecar(folder):
        return Description(config, read_stored_tensors(folder).parameters)
    headers = {path: read_header(path) for path in weight_files(folder)}
    types = quantized_types(config, headers)
    tensors = [tensor for header in headers.values() for tensor in header]
    if not is_original(folder):
        whole = sum(tensor.elements for tensor in tensors)
        return Description(config, sum(types.values()) or whole)
    shape, parameters = shape_of({tensor.name: tensor.shape for tensor in tensors}, config)
    return Description(shape or config, parameters)


def _gguf(path: Path) -> Description:
    header = read_gguf_header(path)
    named = header.metadata
    shape = {
        ours: named.get(f"{named['general.architecture']}.{name}") for ours, name in _GGUF.items()
    }
    if isinstance(tokens := named.get("tokenizer.ggml.tokens"), list):
        shape["vocab_size"] = len(tokens)
    parameters = sum(math.prod(tensor.shape) for tensor in header.tensors)
    return Description({name: value for name, value in shape.items() if value}, parameters)


def _pickled(path: Path) -> Description:
    loaded = read_pickled(path)
    state = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
    sizes = {
        name: value.size
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Shape) and "Complex" not in value.kind
    }
    configs = [loaded[name] for name in CONFIGS if isinstance(loaded.get(name), dict)]
    beside = path.with_name("config.json")
    declared = configs[0] if configs else read_object(beside) if beside.is_file() else {}
    if not sizes:
        raise ModelLoadFailed(f"{path.name} holds no dict of weights")
    return Description(*shape_of(sizes, declared))
