"""Vectors from what clients send, and back: JSON, numpy's archives, GGUF, safetensors."""

from __future__ import annotations

from typing import Any

import numpy

from transformers_api.checkpoints.headers.direction_file import (
    Directions,
    directions_of,
    read_directions,
    write_control_vector,
)
from transformers_api.errors import InvalidRequest, ModelLoadFailed
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.vector_store import Vector

MOST_UNPACKED = 8 << 20  # bytes of a small file's numbers; those of a large one: twice its own


def vector_of_numbers(numbers: Any, layers: list[int] | None, model: str | None) -> Vector:
    """A vector of [C] or [L, C]. Raises InvalidRequest."""
    try:
        directions = directions_of(numbers, None if layers is None else tuple(layers))
    except ModelLoadFailed as error:
        raise InvalidRequest(str(error), param="vector") from None
    return _vector(directions, model)


def vector_of_file(data: bytes, model: str | None) -> Vector:
    """A vector of a file: npz, GGUF or safetensors, by its first bytes. Raises InvalidRequest."""
    try:
        return _vector(read_directions(data, max(MOST_UNPACKED, 2 * len(data))), model)
    except ModelLoadFailed as error:
        raise InvalidRequest(f"The file is refused: {error}") from None


def _vector(directions: Directions, model: str | None) -> Vector:
    return Vector(
        rows=directions.rows, layers=directions.layers, source=directions.kind, model=model
    )


def gguf(vector: Vector, hint: str) -> bytes:
    """A control vector as llama.cpp reads it. Raises InvalidRequest for one without layers."""
    if vector.layers is None:
        raise InvalidRequest("a vector for any layer has no place in a control vector")
    try:
        return write_control_vector(vector.rows, vector.layers, hint)
    except ModelLoadFailed as error:
        raise InvalidRequest(str(error)) from None


def npz(name: str, vector: Vector) -> bytes:
    """A file for ``numpy.load``: ``vector`` (L, C) or (C,), ``layers`` where there are some."""
    if vector.layers is None:
        return arrays.npz({"vector": vector.rows[0]}, {"name": name, "model": vector.model})
    layers = numpy.array(vector.layers, numpy.int64)
    return arrays.npz(
        {"vector": vector.rows, "layers": layers}, {"name": name, "model": vector.model}
    )
