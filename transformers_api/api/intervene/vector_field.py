"""Numbers of a body: a vector, several, or the name of one."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy
from marshmallow import ValidationError, fields

from transformers_api.inspection.base import Array

_DTYPES = {"f16": "<f2", "f32": "<f4"}
_FINITE = "must have finite numbers"


class VectorField(fields.Field[Any]):
    """Numbers: a list, a list of lists, base64 with dtype and shape; or a name in the store."""

    EXPECTED = 'must be a name, a list of numbers, or {"data": base64, "dtype", "shape"}'

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Array | str:
        if isinstance(value, str):
            if not 1 <= len(value) <= 64:
                raise ValidationError(self.EXPECTED)
            return value
        array = _decoded(value) if isinstance(value, dict) else _listed(value)
        if not numpy.isfinite(array).all():
            raise ValidationError(_FINITE)
        return array


def _listed(value: Any) -> Array:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for row in rows:
        if not isinstance(row, list) or not row or len(row) != len(rows[0]):
            raise ValidationError(VectorField.EXPECTED)
        if not {*map(type, row)} <= {int, float}:
            raise ValidationError(VectorField.EXPECTED)
    with numpy.errstate(over="ignore"):
        try:
            array = numpy.array(rows, numpy.float64).astype(numpy.float32)
        except OverflowError:
            raise ValidationError(_FINITE) from None
    return array if rows is value else array[0]


def _decoded(value: dict[str, Any]) -> Array:
    match value:
        case {"data": str(data), "dtype": str(dtype), "shape": list(shape), **rest} if not rest:
            pass
        case _:
            raise ValidationError(VectorField.EXPECTED)
    if dtype not in _DTYPES:
        raise ValidationError('must have the dtype "f16" or "f32"')
    sizes = [size for size in shape if type(size) is int and 0 < size < 1 << 24]
    if len(sizes) != len(shape) or len(sizes) not in (1, 2):
        raise ValidationError("must have a shape of one or two numbers")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValidationError("must have data in base64") from None
    count, item = int(numpy.prod(sizes)), numpy.dtype(_DTYPES[dtype])
    if len(raw) != count * item.itemsize:
        raise ValidationError(
            f"has {len(raw)} bytes of data; shape {sizes} of {dtype} are {count * item.itemsize}"
        )
    return numpy.frombuffer(raw, item).astype(numpy.float32).reshape(sizes)
