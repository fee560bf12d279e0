"""The header of a safetensors file, read without believing it.

Nothing that a header says is believed before it is compared with the size of the file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_api.errors import ModelLoadFailed

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_NAME = 1000  # characters of a tensor's
MAX_DIMENSIONS = 64  # as torch has them
LFS_POINTER = b"version https://git-lfs"

# name in a safetensors header -> (bits per element, torch's name)
DTYPES: Mapping[str, tuple[int, str]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "float4_e2m1fn_x2"),
    "C64": (64, "complex64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "I8": (8, "int8"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header, already checked against the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int  # of its first byte in the file

    @property
    def elements(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file whose header fits the file to the byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ModelLoadFailed(f"{path}: {size} bytes are too few for a safetensors file")
        refuse_pointer(path, start + file.read(len(LFS_POINTER)))
        file.seek(len(start))
        length = struct.unpack("<Q", start)[0]
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelLoadFailed(
                f"{path}: a header of {length} bytes in a file of {size}: truncated, or not "
                "safetensors"
            )
        header = parse_object(file.read(length), path)
    header.pop("__metadata__", None)
    spans = [_span(path, name, entry, 8 + length) for name, entry in header.items()]
    spans.sort(key=lambda span: span[:2])
    end = 0
    for first, last, tensor in spans:
        if first != end:
            raise ModelLoadFailed(f"{path}: tensor {tensor.name} starts at {first}, not at {end}")
        end = last
    if 8 + length + end != size:
        raise ModelLoadFailed(
            f"{path} has {size} bytes, its header describes {8 + length + end}: truncated or padded"
        )
    return [tensor for _, _, tensor in spans]


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise ModelLoadFailed where a file that begins with ``start`` stands for another one."""
    if start.startswith(LFS_POINTER):
        raise ModelLoadFailed(
            f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder, or "
            "download the file"
        )


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """The object that a text of JSON is. Raises ModelLoadFailed, naming the file."""
    refuse_pointer(path, text[: len(LFS_POINTER)])
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadFailed(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelLoadFailed(f"{path}: not a JSON object")
    return value


def _span(path: Path, name: str, entry: Any, start: int) -> tuple[int, int, Tensor]:
    """(first byte, byte after the last, tensor) of a header entry whose three facts agree.

    ``start``: the byte of the file that such bytes are counted from.
    """
    if len(name) > MAX_NAME:
        raise ModelLoadFailed(f"{path}: a tensor's name has {len(name)} characters: {name[:50]}…")
    try:
        (first, last), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        numbers = (first, last, *shape)
        bits = DTYPES[dtype][0]
    except (TypeError, KeyError, ValueError):
        raise ModelLoadFailed(
            f"{path}: tensor {name} is described wrongly: {str(entry)[:200]}"
        ) from None
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ModelLoadFailed(f"{path}: tensor {name} has no shape of up to {MAX_DIMENSIONS} sizes")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ModelLoadFailed(f"{path}: tensor {name} has offsets or a shape that cannot be")
    if (last - first) * 8 != math.prod(shape) * bits:
        raise ModelLoadFailed(
            f"{path}: tensor {name} has {last - first} bytes, but {dtype} {shape} does not"
        )
    return first, last, Tensor(name, dtype, tuple(shape), last - first, start + first)
