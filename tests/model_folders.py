"""Model folders for tests of what happens before weights are loaded; no torch, a few kilobytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
TENSORS = {"a": ("F32", [4, 8]), "b": ("F16", [3]), "c": ("F32", [])}


def safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header


def safetensors_bytes(header: Mapping[str, Any], data: bytes | None = None) -> bytes:
    text = json.dumps(header).encode()
    if data is None:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        data = bytes(max(ends, default=0))
    return struct.pack("<Q", len(text)) + text + data


def model_files(
    config: Mapping[str, Any] = LLAMA,
    tensors: Mapping[str, tuple[str, Sequence[int]]] = TENSORS,
) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"do_sample": false}',
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"model_max_length": 64}',
        "model.safetensors": safetensors_bytes(safetensors_header(tensors)),
    }


def sharded_files() -> dict[str, bytes]:
    files = model_files()
    del files["model.safetensors"]
    shards = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for shard, name in shards.items():
        files[shard] = safetensors_bytes(safetensors_header({name: TENSORS[name]}))
    weight_map = {name: shard for shard, name in shards.items()}
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {}, "weight_map": weight_map}
    ).encode()
    return files


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
