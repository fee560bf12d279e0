"""A quantised parameter of a checkpoint, by the layout of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from transformers_api.checkpoints.headers.quantized_parts import QuantizedTensor
from transformers_api.engine.file_tensor import AT_ONCE
from transformers_api.engine.quantized.floats import Float8Rows, FourBitRows, Mxfp4Rows
from transformers_api.engine.quantized.integers import (
    AwqRows,
    GptqRows,
    Int8Rows,
    PackedRows,
    ScbRows,
)
from transformers_api.engine.quantized.rows import Parts, QuantizedRows

LAYOUTS: Mapping[str, Callable[[QuantizedTensor, Parts, int | None], QuantizedRows]] = {
    "gptq": GptqRows,
    "awq": AwqRows,
    "packed": PackedRows,
    "int8": Int8Rows,
    "bnb8": ScbRows,
    "float8": Float8Rows,
    "mxfp4": Mxfp4Rows,
    "bnb4": FourBitRows,
}


class QuantizedFileTensor:
    """A quantised parameter of the files; see FileTensor."""

    def __init__(self, spec: QuantizedTensor, parts: Parts) -> None:
        self.spec = spec
        self.shape = spec.shape
        self._parts = parts

    @property
    def bytes(self) -> int:
        """Bytes in the files."""
        return sum(part.entry.bytes for part in self._parts.values())

    @property
    def type(self) -> str:
        """The width that is near to it."""
        return self.spec.width

    def matrix(self, index: int | None, **_: Any) -> QuantizedRows:
        """The rows of the parameter, or of one of the matrices in it."""
        return LAYOUTS[self.spec.layout](self.spec, self._parts, index)

    def copied(self, dtype: torch.dtype) -> Tensor:
        """The parameter as numbers in memory of its own."""
        made = torch.empty(self.shape, dtype=dtype)
        stack = made if len(self.shape) == 3 else made[None]
        for index, whole in enumerate(stack):
            matrix = self.matrix(index if len(self.shape) == 3 else None)
            out, width = matrix.shape
            target = (
                whole.t() if whole.shape != (out, width) or self.spec.layout == "mxfp4" else whole
            )
            at_once = max(AT_ONCE // width, 1)
            for first in range(0, out, at_once):
                count = min(at_once, out - first)
                target[first : first + count] = matrix.rows(first, count)
            matrix.release()
        return made
