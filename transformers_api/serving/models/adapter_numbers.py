"""The check that all numbers of a safetensors file are finite: by numpy, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.checkpoints.headers.safetensors_file import Tensor
from transformers_api.errors import ModelLoadFailed

PIECE_BYTES = 4 << 20
INFINITE_BF16 = 0x7F80  # the exponent of numbers that are none
FLOATS = {"F64": numpy.float64, "F32": numpy.float32, "F16": numpy.float16}


def check_finite(path: Path, tensors: Sequence[Tensor]) -> None:
    """Raise ModelLoadFailed for a number that is not finite, naming its tensor.

    ``tensors``: all of the file, of floats.
    """
    with path.open("rb") as file:
        for tensor in tensors:
            file.seek(tensor.offset)
            left = tensor.bytes
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                if not piece:
                    raise ModelLoadFailed(f"{path} has changed while it was read")
                left -= len(piece)
                if not _is_finite(piece, tensor.dtype):
                    raise ModelLoadFailed(f"{path}: {tensor.name} has numbers that are not finite")


def _is_finite(piece: bytes, dtype: str) -> bool:
    if dtype == "BF16":
        bits: NDArray[numpy.uint16] = numpy.frombuffer(piece, numpy.uint16)
        return not ((bits & INFINITE_BF16) == INFINITE_BF16).any()
    return is_finite(numpy.frombuffer(piece, FLOATS[dtype]))


def is_finite(numbers: NDArray[Any]) -> bool:
    """True where all numbers are."""
    return bool(numpy.isfinite(numbers).all())
