"""The compiled kernels as Python sees them: structures, operations, types, functions, threads.

The only mirror of src/abi.h. A library states its ABI version and the layout of everything in that
file; one that differs from this module is refused before anything else of it is called.

A call through ctypes costs less than one through torch's dispatcher, and the sources compile in
seconds because they include nothing of torch. Calls of a few rows keep the interpreter's lock: to
release it and to get it back among busy threads takes longer than the call.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

from transformers_api.kernels.build import LibraryRefused, check_trusted

ABI_VERSION = 6
OPS = (
    *("copy", "add", "sub", "mul", "div", "neg", "cube", "rsqrt", "sqrt", "exp", "tanh", "silu"),
    *(
        "sigmoid",
        "gelu",
        "gelu_tanh",
        "relu",
        "cos",
        "sin",
        "abs",
        "log",
        "floor",
        "expm1",
        "log1p",
        "softplus",
        "power",
    ),
    *("maximum", "minimum", "equal", "not_equal", "less", "less_equal", "where", "mean", "sum"),
    *("largest", "softmax", "layer_norm", "gather", "matmul", "top_k", "take", "put", "linear"),
    *("experts", "low_rank", "attention", "write_cache", "read_cache", "unpack_rows"),
)
TYPE_NUMBERS = {"F32": 0, "BF16": 1, "I8": 2, "I64": 3, "I4": 4, "BOOL": 5, "I4C": 6}
# Of activations, the KV cache, packed weights, operands.
TYPES = {torch.float32: TYPE_NUMBERS["F32"], torch.bfloat16: TYPE_NUMBERS["BF16"]}
KV_TYPES = {**TYPES, torch.int8: TYPE_NUMBERS["I8"]}
WEIGHT_TYPES = {
    "float32": TYPE_NUMBERS["F32"],
    "bfloat16": TYPE_NUMBERS["BF16"],
    "int8": TYPE_NUMBERS["I8"],
    "int4": TYPE_NUMBERS["I4"],
}
OPERAND_TYPES = {
    **TYPES,
    torch.int64: TYPE_NUMBERS["I64"],
    torch.bool: TYPE_NUMBERS["BOOL"],
}


class Weight(ctypes.Structure):
    """A packed weight matrix (n outputs, k inputs)."""

    _fields_ = (
        ("type", c_int32),
        ("unused", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
    )


class Packing(ctypes.Structure):
    """Rows of a packed weight, to be made of a dense matrix."""

    _fields_ = (
        ("weight", c_void_p),
        ("source", c_void_p),
        ("row", c_int64),
        ("count", c_int64),
        ("type", c_int64),
    )


class Experts(ctypes.Structure):
    """The matrices of a layer's experts."""

    _fields_ = (("count", c_int64), ("weights", c_void_p))


class LowRankPart(ctypes.Structure):
    """The addition of an adapter to some outputs of a layer."""

    _fields_ = (
        ("down", c_void_p),
        ("up", c_void_p),
        ("adapter", c_int64),
        ("column", c_int64),
        ("gain", c_void_p),
        ("offset", c_void_p),
    )


class LowRank(ctypes.Structure):
    """All that adapters add to the results of one layer."""

    _fields_ = (("count", c_int64), ("parts", c_void_p), ("n", c_int64), ("adapters", c_int64))


class Attention(ctypes.Structure):
    """Causal attention over a KV cache."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("starts", c_void_p),
        ("cache_rows", c_void_p),
        ("sinks", c_void_p),
        ("slopes", c_void_p),
        ("rows", c_int64),
        ("queries", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("size", c_int64),
        ("q_strides", c_int64 * 3),
        ("k_strides", c_int64 * 3),
        ("v_strides", c_int64 * 3),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("q_type", c_int32),
        ("kv_type", c_int32),
    )


class CacheWrite(ctypes.Structure):
    """New keys or values, and the rows of the KV cache that they are written into."""

    _fields_ = (
        ("source", c_void_p),
        ("target", c_void_p),
        ("starts", c_void_p),
        ("cache_rows", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("queries", c_int64),
        ("size", c_int64),
        ("source_strides", c_int64 * 3),
        ("target_strides", c_int64 * 3),
        ("source_type", c_int32),
        ("target_type", c_int32),
    )


class Operand(ctypes.Structure):
    """An operand of a Step."""

    _fields_ = (
        ("data", c_void_p),
        ("strides", c_int64 * 4),
        ("type", c_int32),
        ("unused", c_int32),
    )


class Step(ctypes.Structure):
    """One operation of a recorded forward pass."""

    _fields_ = (
        ("op", c_int32),
        ("operands", c_int32),
        ("sizes", c_int64 * 4),
        ("out", Operand),
        ("inputs", Operand * 3),
        ("scalar", c_double),
        ("call", c_void_p),
        ("fused", c_int64),
    )


class ChangeState(ctypes.Structure):
    """The fate of the changes of one sequence in a pass."""

    _fields_ = (("failed", c_int64), ("nanoseconds", c_int64))


class RowChange(ctypes.Structure):
    """A change of rows of a tensor within a pass, or a copy of them."""

    _fields_ = (
        ("at", c_int64),
        ("rows", c_void_p),
        ("count", c_int64),
        ("stride", c_int64),
        ("width", c_int64),
        ("type", c_int32),
        ("op", c_int32),
        ("vector", c_void_p),
        ("vector_stride", c_int64),
        ("factor", c_float),
        ("largest", c_float),
        ("number", c_int64),
        ("state", c_void_p),
        ("target", c_void_p),
        ("tokens", c_void_p),
    )


class SampleRow(ctypes.Structure):
    """One row of logits and how to sample from it."""

    _fields_ = (
        ("logits", c_void_p),
        ("size", c_int64),
        ("key", c_int64),
        ("top_k", c_int64),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("allowed", c_void_p),
    )


class TokenStats(ctypes.Structure):
    """A token and the distribution it comes from; the last three are results."""

    _fields_ = (
        ("logits", c_void_p),
        ("size", c_int64),
        ("token", c_int64),
        ("count", c_int64),
        ("logprob", c_double),
        ("entropy", c_double),
        ("rank", c_int64),
    )


STRUCTURES = (
    *(Weight, Packing, Experts, LowRankPart, LowRank, Attention, CacheWrite),
    *(Operand, Step, ChangeState, RowChange, SampleRow, TokenStats),
)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "set_threads": (None, [c_int32]),
    "packed_bytes": (c_int64, [POINTER(Weight)]),
    "checksum": (c_uint64, [c_void_p, c_int64]),
    "pack": (None, [POINTER(Weight), c_void_p, c_int32, c_int64, c_int64]),
    "pack_all": (None, [c_void_p, c_int64]),
    "pack_int4": (None, [POINTER(Weight), c_void_p, c_int32, c_int64, c_int64, c_void_p]),
    "block_row_bytes": (c_int64, [c_int32, c_int64]),
    "pack_blocks": (
        None,
        [POINTER(Weight), c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p],
    ),
    "unpack_blocks": (None, [c_void_p, c_int32, c_int64, c_void_p, c_int64, c_void_p]),
    "multiply_blocks": (
        None,
        [c_void_p, c_int32, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p],
    ),
    "unpack_rows": (None, [POINTER(Weight), c_void_p, c_int64, c_void_p]),
    "linear": (None, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32]),
    "experts": (
        None,
        [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32],
    ),
    "low_rank": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int32]),
    "attention": (None, [POINTER(Attention)]),
    "write_cache": (None, [POINTER(CacheWrite)]),
    "read_cache": (None, [POINTER(CacheWrite)]),
    "run_steps": (None, [c_void_p, c_int64]),
    "run_changed_steps": (None, [c_void_p, c_int64, c_void_p, c_int64]),
    "sample": (None, [c_void_p, c_int64, c_void_p]),
    "attention_probs": (None, [c_void_p, *[c_int64] * 4, c_void_p, c_void_p]),
    "token_stats": (None, [c_void_p, c_void_p, c_void_p]),
}


class Layout(NamedTuple):
    """The part of an ABI that is numbers: sizes and offsets in bytes, operations, types."""

    sizes: dict[str, int]
    offsets: dict[str, dict[str, int]]
    ops: tuple[str, ...]
    types: dict[str, int]

    @classmethod
    def own(cls) -> Layout:
        """The layout that this module declares."""
        return cls(
            {each.__name__: ctypes.sizeof(each) for each in STRUCTURES},
            {
                each.__name__: {name: getattr(each, name).offset for name, *_ in each._fields_}
                for each in STRUCTURES
            },
            OPS,
            TYPE_NUMBERS,
        )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that a library states; see src/abi.cpp. Raises ValueError."""
        layout = cls({}, {}, (), {})
        for line in text.splitlines():
            kind, *words = line.split()
            if kind == "struct":
                name, size, *fields = words
                layout.sizes[name] = int(size)
                layout.offsets[name] = _numbers(fields)
            elif kind == "ops":
                layout = layout._replace(ops=tuple(words))
            elif kind == "types":
                layout = layout._replace(types=_numbers(words))
        return layout


class Library:
    """The compiled kernels, with a pool of ``threads`` that all calls of the process share.

    Raises LibraryRefused for a file that must not be used, NativeUnavailable where its folder is
    not safe, OSError where it cannot be opened.
    """

    def __init__(self, path: Path, threads: int, isa: str = "") -> None:
        check_trusted(path)
        self.isa = isa  # the instruction set that it is compiled for
        with_gil = ctypes.PyDLL(str(path))
        check_abi(with_gil)
        self.with_gil = _declare(with_gil)  # keeps the interpreter's lock
        self.without_gil = _declare(ctypes.CDLL(str(path)))  # other threads run meanwhile
        self.set_threads(threads)

    def set_threads(self, count: int) -> None:
        """Resize the pool; waits for a call in progress."""
        self.without_gil.set_threads(count)


def check_abi(library: Any) -> None:
    """Compare a library's ABI with this module. Raises LibraryRefused, naming the difference."""
    try:
        version = library.abi_version()
        if version != ABI_VERSION:
            raise LibraryRefused(
                f"its ABI has version {version}, and this program needs {ABI_VERSION}"
            )
        library.abi_layout.restype = c_char_p
        theirs = Layout.parse(library.abi_layout().decode())
    except (AttributeError, ValueError) as error:
        raise LibraryRefused(f"it does not state its ABI: {error}") from error
    if difference := _difference(theirs, Layout.own()):
        raise LibraryRefused(difference)


def _difference(theirs: Layout, own: Layout) -> str | None:
    """The first difference, in words."""
    for name, size in own.sizes.items():
        if theirs.sizes.get(name) != size:
            return f"struct {name} has {theirs.sizes.get(name)} bytes in it, and {size} here"
        for field, offset in own.offsets[name].items():
            other = theirs.offsets[name].get(field)
            if other != offset:
                return f"{name}.{field} is at byte {other} in it, and at {offset} here"
    for number, (other_op, op) in enumerate(zip_longest(theirs.ops, own.ops)):
        if other_op != op:
            return f"operation {number} is {other_op} in it, and {op} here"
    for name, number in own.types.items():
        if theirs.types.get(name) != number:
            return f"type {name} is {theirs.types.get(name)} in it, and {number} here"
    return None


def _numbers(words: list[str]) -> dict[str, int]:
    pairs = (word.split(":") for word in words)
    return {name: int(number) for name, number in pairs}


def _declare(library: Any) -> Any:
    for name, (result, arguments) in SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise LibraryRefused(f"it has no function {name}") from error
        function.restype, function.argtypes = result, arguments
    return library
