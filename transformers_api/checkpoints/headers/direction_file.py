"""Directions of a residual stream in files: GGUF control vectors, safetensors, numpy's archives.

A tensor ``direction.N`` (N layers of it, as llama.cpp and repeng write control vectors) is added
after layer N, counted from 0; ``vector`` is one direction (C,), or a row (L, C) for each of
``layers``. Every size is compared with the bytes that are there before anything is reserved by it.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.checkpoints.headers.gguf_file import MAGIC, STRING, read_gguf_header
from transformers_api.checkpoints.headers.tensor_file import (
    numbers,
    read_archive,
    read_safetensors,
)
from transformers_api.errors import ModelLoadFailed

Array = NDArray[numpy.float32]

ARCHITECTURE = "controlvector"
ALIGNMENT = 32
MOST_LAYERS = 1024
_DIRECTION = re.compile(r"direction\.(\d{1,4})")
_GGUF_KINDS = {0: "<f4", 1: "<f2", 30: "bf16"}
_UINT32, _FLOAT32 = 4, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Directions:
    """The rows of a file. ``layers`` is None for one direction that is for any layer."""

    rows: Array  # (L, C)
    layers: tuple[int, ...] | None
    kind: str  # of the file
    hint: str | None = None  # the type of the model it was made with, where the file says so


def read_directions(data: bytes, most_bytes: int) -> Directions:
    """The directions of a file, which is known by its first bytes.

    ``most_bytes``: of the numbers, once they are unpacked. Raises ModelLoadFailed.
    """
    if data.startswith(b"PK"):
        return _of(read_archive(data, most_bytes), "npz")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        try:
            if data.startswith(MAGIC):
                return _of_gguf(path, data)
            return _of(read_safetensors(path, data), "safetensors")
        except ModelLoadFailed as error:
            raise ModelLoadFailed(str(error).replace(str(path), "the file")) from None


def write_control_vector(rows: Array, layers: Iterable[int], hint: str) -> bytes:
    """A GGUF control vector of rows (L, C), as llama.cpp reads it: one tensor for each layer.

    Layer 0 has no place in such a file. Raises ModelLoadFailed.
    """
    layers = list(layers)
    if 0 in layers:
        raise ModelLoadFailed("a control vector has no direction for layer 0")
    metadata = [
        (b"general.architecture", STRING, _text(ARCHITECTURE)),
        (b"controlvector.model_hint", STRING, _text(hint)),
        (b"controlvector.layer_count", _UINT32, struct.pack("<I", len(layers))),
    ]
    head = MAGIC + struct.pack("<IQQ", 3, len(layers), len(metadata))
    for key, kind, value in metadata:
        head += struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    row_bytes = rows.shape[1] * 4
    step = -(-row_bytes // ALIGNMENT) * ALIGNMENT
    for number, layer in enumerate(layers):
        head += _text(f"direction.{layer}")
        head += struct.pack("<IQIQ", 1, rows.shape[1], _FLOAT32, number * step)
    body = b"".join(row.astype("<f4").tobytes().ljust(step, b"\0") for row in rows)
    return head + b"\0" * (-len(head) % ALIGNMENT) + body


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _of_gguf(path: Path, data: bytes) -> Directions:
    header = read_gguf_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelLoadFailed(f"the file holds a {architecture}, not a {ARCHITECTURE}")
    tensors = {}
    for tensor in header.tensors:
        kind = _GGUF_KINDS.get(tensor.kind)
        if kind is None:
            raise ModelLoadFailed(f"{tensor.name} is quantised: it must be F32, F16 or BF16")
        tensors[tensor.name] = numbers(data, tensor.offset, tensor.bytes, kind, tensor.shape)
    hint = header.metadata.get("controlvector.model_hint")
    return _of(tensors, "gguf", hint if isinstance(hint, str) else None)


def _of(tensors: Mapping[str, NDArray[Any]], kind: str, hint: str | None = None) -> Directions:
    if "vector" in tensors:
        listed = tensors.get("layers")
        layers = None if listed is None else tuple(int(layer) for layer in listed.ravel())
        return _rows(tensors["vector"], layers, kind, hint)
    named = {
        int(match[1]): tensor
        for name, tensor in tensors.items()
        if (match := _DIRECTION.fullmatch(name))
    }
    if not named:
        names = ", ".join(list(tensors)[:5]) or "none"
        raise ModelLoadFailed(
            f"there is neither a tensor vector nor any direction.N; there are: {names}"
        )
    layers = tuple(sorted(named))
    shapes = {named[layer].shape for layer in layers}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ModelLoadFailed("the directions have different shapes, or more than one dimension")
    return _rows(numpy.stack([named[layer] for layer in layers]), layers, kind, hint)


def _rows(
    vector: NDArray[Any], layers: tuple[int, ...] | None, kind: str, hint: str | None = None
) -> Directions:
    if vector.ndim not in (1, 2) or 0 in vector.shape:
        raise ModelLoadFailed(
            f"vector has the shape {list(vector.shape)}: it must be [C] or [L, C]"
        )
    if vector.ndim == 2 and len(vector) > MOST_LAYERS:
        raise ModelLoadFailed(f"there are {len(vector)} rows (max {MOST_LAYERS})")
    if vector.ndim == 2 and layers is None:
        layers = tuple(range(len(vector)))
    rows = numpy.atleast_2d(vector)
    if layers is not None and len(layers) != len(rows):
        raise ModelLoadFailed(f"there are {len(rows)} rows for {len(layers)} layers")
    if layers is not None and not all(0 <= layer < MOST_LAYERS for layer in layers):
        raise ModelLoadFailed(f"layers must be in [0, {MOST_LAYERS - 1}]")
    if layers is not None and len(set(layers)) < len(layers):
        raise ModelLoadFailed("layers must differ from each other")
    with numpy.errstate(over="ignore"):
        rows = rows.astype(numpy.float32)
    if not numpy.isfinite(rows).all():
        raise ModelLoadFailed("every number must be finite")
    return Directions(rows=rows, layers=layers, kind=kind, hint=hint)


def directions_of(vector: Any, layers: tuple[int, ...] | None) -> Directions:
    """The directions of numbers [C] or [L, C] as JSON has them. Raises ModelLoadFailed."""
    try:
        rows = numpy.array(vector, numpy.float64)
    except (ValueError, OverflowError):
        raise ModelLoadFailed("vector must have rows of the same length") from None
    return _rows(rows, layers, "json")
