"""Arrays to what goes over the wire: envelopes, rows of numbers, files, pictures.

Envelopes hold little-endian numbers in base64, the last axis fastest (order C). NaN stands for
what there is not: float16 keeps it, rows of numbers have null there, bytes and pictures 0.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

Numbers = NDArray[Any]
Json = dict[str, Any]
Reduction = Literal["max", "mean"]

DECIMALS = 5  # of shares, whose sum is 1
DIGITS = 6  # of all other numbers, however small


def float16(values: Numbers) -> Json:
    """The envelope of half precision: three digits, whatever the size of a number."""
    return _envelope("float16", values.shape, values.astype("<f2"))


def uint8(values: Numbers) -> Json:
    """The envelope of bytes: ``value = q / 255 * scale[row]``.

    A row is what lies along the last axis; ``scale`` has the largest number of each, in order.
    Numbers must not be negative. No number is off by more than its row's ``scale / 510``.
    """
    rows = values.reshape(-1, values.shape[-1]) if values.size else values.reshape(0, 1)
    rows = numpy.nan_to_num(rows.astype(numpy.float32), nan=0.0)
    scale = rows.max(axis=1) if rows.size else rows[:, 0]
    quotient = rows / numpy.where(scale > 0, scale, 1)[:, None]
    packed = numpy.rint(quotient * 255).astype(numpy.uint8)
    return {**_envelope("uint8", values.shape, packed), "scale": shortest(scale)}


def _envelope(dtype: str, shape: Sequence[int], packed: Numbers) -> Json:
    return {
        "dtype": dtype,
        "shape": list(shape),
        "order": "C",
        "encoding": "base64",
        "data": b64encode(numpy.ascontiguousarray(packed).tobytes()).decode(),
    }


def rounded(values: Numbers) -> Any:
    """Nested lists of numbers with 5 decimals; null for NaN."""
    return _lists(values.astype(numpy.float64).round(DECIMALS))


def significant(values: Numbers) -> Any:
    """Nested lists of numbers with 6 significant digits; null for NaN."""
    numbers = values.astype(numpy.float64)
    size = numpy.abs(numbers)
    regular = numpy.isfinite(size) & (size > 0)
    places = DIGITS - 1 - numpy.floor(numpy.log10(numpy.where(regular, size, 1.0)))
    up, down = 10.0 ** places.clip(0), 10.0 ** (-places).clip(0)  # both exact: repr stays short
    return _lists(numpy.where(regular, numpy.rint(numbers * up / down) * down / up, numbers))


def digits(value: float) -> float:
    """A number with 6 significant digits."""
    return float(f"{value:.{DIGITS}g}")


def exact(values: Numbers) -> Any:
    """Nested lists of numbers as they are, to the last bit; null for NaN."""
    return _lists(values.astype(numpy.float64))


def shortest(values: Numbers) -> list[float]:
    """float32 numbers with as few digits as tell them from every other float32."""
    return [float(str(value)) for value in values.astype(numpy.float32).ravel()]


def _lists(values: NDArray[numpy.float64]) -> Any:
    missing = numpy.isnan(values)
    if not missing.any():
        return values.tolist()
    cells = values.astype(object)
    cells[missing] = None
    return cells.tolist()


def pool(values: Numbers, height: int, width: int, how: Reduction) -> Numbers:
    """(…, R, C) made smaller to (…, height, width).

    A cell is the max or the mean of those that fall together there; an axis that is not longer
    than asked for stays as it is.
    """
    for axis, size in ((-2, height), (-1, width)):
        length = values.shape[axis]
        if size >= length:
            continue
        edges = numpy.arange(size) * length // size
        if how == "max":
            values = numpy.maximum.reduceat(values, edges, axis=axis)
        else:
            counts = numpy.diff(edges, append=length).astype(numpy.float32)
            sums = numpy.add.reduceat(values, edges, axis=axis, dtype=numpy.float32)
            values = sums / (counts[:, None] if axis == -2 else counts)
    return values


def npz(arrays: Mapping[str, Numbers], meta: Mapping[str, Any]) -> bytes:
    """A file for ``numpy.load``: the arrays, and ``meta`` as the bytes of its JSON."""
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()
    file = io.BytesIO()
    numpy.savez_compressed(
        file, allow_pickle=False, **arrays, meta=numpy.frombuffer(text, dtype=numpy.uint8)
    )
    return file.getvalue()
