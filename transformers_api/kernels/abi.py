"""The compiled kernels as Python sees them: structs, signatures, threads.

A call through ctypes costs less than one through torch's dispatcher, and the file compiles in
seconds because it includes nothing of torch. Calls of a few rows keep the interpreter's lock: to
give it up and to get it back among busy threads takes longer than the call.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from transformers_api.kernels.build import NativeUnavailable, build, check_processor

log = logging.getLogger(__name__)
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # kernels.cpp: enum Type
WEIGHT_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 4}


class Weight(ctypes.Structure):
    """kernels.cpp: struct Weight."""

    _fields_ = (
        ("type", c_int32),
        ("unused", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
    )


class Attention(ctypes.Structure):
    """kernels.cpp: struct Attention."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("starts", c_void_p),
        ("sinks", c_void_p),
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


class Copy(ctypes.Structure):
    """kernels.cpp: struct Copy."""

    _fields_ = (
        ("source", c_void_p),
        ("target", c_void_p),
        ("starts", c_void_p),
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
    """kernels.cpp: struct Operand."""

    _fields_ = (
        ("data", c_void_p),
        ("strides", c_int64 * 4),
        ("type", c_int32),
        ("unused", c_int32),
    )


class Step(ctypes.Structure):
    """kernels.cpp: struct Step."""

    _fields_ = (
        ("op", c_int32),
        ("operands", c_int32),
        ("sizes", c_int64 * 4),
        ("out", Operand),
        ("inputs", Operand * 3),
        ("number", c_double),
        ("call", c_void_p),
        ("together", c_int64),
    )


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "set_threads": (None, [c_int32]),
    "packed_bytes": (c_int64, [POINTER(Weight)]),
    "pack": (None, [POINTER(Weight), c_void_p, c_int32, c_int64, c_int64]),
    "pack_int4": (None, [POINTER(Weight), c_void_p, c_int32, c_int64, c_int64, c_void_p]),
    "rows_of": (None, [POINTER(Weight), c_void_p, c_int64, c_void_p]),
    "linear": (None, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32]),
    "attention": (None, [POINTER(Attention)]),
    "write_cache": (None, [POINTER(Copy)]),
    "run_steps": (None, [c_void_p, c_int64]),
    "draw": (None, [c_void_p, c_int64, c_void_p]),
    "shares": (None, [c_void_p, *[c_int64] * 4, c_void_p, c_void_p]),
    "figures": (None, [c_void_p, c_void_p, c_void_p]),
}


class Library:
    """The kernels, with a team of ``threads`` that all calls of the process share."""

    def __init__(self, path: Path, threads: int) -> None:
        self.quick = _declared(ctypes.PyDLL(str(path)))  # keeps the interpreter's lock
        self.long = _declared(ctypes.CDLL(str(path)))  # lets other threads run meanwhile
        self.set_threads(threads)

    def set_threads(self, count: int) -> None:
        """Resize the team; waits for a call in progress."""
        self.long.set_threads(count)


def load_library(cache: Path, threads: int) -> Library | None:
    """The kernels, compiled into ``cache`` if they are not there; None with a line in the log."""
    try:
        check_processor()
        return Library(build(cache), threads)
    except (NativeUnavailable, OSError) as error:
        log.warning("No native kernels, so inference is slower: %s", error)
        return None


def _declared(library: Any) -> Any:
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
