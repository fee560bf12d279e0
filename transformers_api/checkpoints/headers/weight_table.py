"""The table of a sidecar (``weights.json``), read without believing it.

It says where the parameters of a GGUF model lie. What passes here lies inside its files, has the
bytes that its shape takes, and can be made into its parameter by operations that exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.safetensors_file import parse_object
from transformers_api.errors import ModelLoadFailed

TABLE = "weights.json"
LARGEST = 1 << 48
# ggml's name of a type -> (weights of a block, its bytes)
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 40),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "F64": (1, 8),
    "IQ1_M": (256, 56),
    "BF16": (1, 2),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q1_0": (128, 18),
}


def read_table(folder: Path) -> dict[str, Any]:
    """The table of a folder. Raises ModelLoadFailed for one that is damaged, OSError."""
    path = folder / TABLE
    table = parse_object(path.read_bytes(), path)
    try:
        sizes = [_size(file) for file in table["files"]]
        for name, tensor in table["tensors"].items():
            _check_tensor(name, tensor, sizes)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadFailed(f"{path} is damaged: {str(error)[:200]}") from None
    return table


def _size(file: Mapping[str, Any]) -> int:
    if not isinstance(file["path"], str) or "\0" in file["path"]:
        raise ValueError("a file without a path")
    return _whole(file["bytes"])


def _whole(number: Any, least: int = 0) -> int:
    if type(number) is not int or not least <= number < LARGEST:
        raise ValueError(f"{number!r:.50} is no size")
    return number


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list):
        raise ValueError(f"{sizes!r:.50} is no shape")
    return tuple(_whole(size, 1) for size in sizes)


def _check_tensor(name: str, tensor: Mapping[str, Any], sizes: list[int]) -> None:
    shape, parts, join = _shape(tensor["shape"]), tensor["parts"], tensor["join"]
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"{name} has no parts")
    made = [_check_part(name, part, sizes) for part in parts]
    whole = list(made[0])
    if join is not None:
        dim = _whole(join["dim"])
        whole[dim] = sum(each[dim] for each in made)
        if join.get("interleave") and len(set(made)) > 1:
            raise ValueError(f"{name} is joined of parts of different shapes")
    elif len(made) > 1:
        raise ValueError(f"{name} has {len(made)} parts, and nothing joins them")
    if tuple(whole) != shape:
        raise ValueError(f"{name} is {list(shape)}, and its parts make {whole}")


def _check_part(name: str, part: Mapping[str, Any], sizes: list[int]) -> tuple[int, ...]:
    """The shape of a part after its operations."""
    shape = _shape(part["shape"])
    block, size = BLOCKS[part["type"]]
    offset, length = _whole(part["offset"]), _whole(part["bytes"])
    if not shape or shape[-1] % block or math.prod(shape) // block * size != length:
        raise ValueError(f"{name} has {length} bytes, which {list(shape)} does not take")
    if offset + length > sizes[_whole(part["file"])]:
        raise ValueError(f"{name} ends behind its file")
    for op in part["ops"]:
        shape = _OPERATIONS[op["op"]](op, shape)
    return shape


def _rows_of(count: int) -> Callable[[Mapping[str, Any], tuple[int, ...]], tuple[int, ...]]:
    def check(op: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] % (count * _whole(op["heads"], 1)):
            raise ValueError(f"{list(shape)} has no rows of {op['heads']} heads")
        return shape

    return check


def _transposed(_op: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    *rest, rows, columns = shape
    return (*rest, columns, rows)


def _unsqueezed(op: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    dim = _whole(op["dim"])
    if dim > len(shape):
        raise ValueError(f"{list(shape)} has no dimension {dim}")
    return (*shape[:dim], 1, *shape[dim:])


def _added(op: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    if not math.isfinite(op["value"]):
        raise ValueError("a number that is added is not finite")
    return shape


_OPERATIONS: Mapping[str, Callable[[Mapping[str, Any], tuple[int, ...]], tuple[int, ...]]] = {
    "heads": _rows_of(2),
    "bloom_qkv": _rows_of(3),
    "transpose": _transposed,
    "unsqueeze": _unsqueezed,
    "add": _added,
    "log_neg": lambda _op, shape: shape,
}
