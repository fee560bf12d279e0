"""The weights of a GGUF file on their way into packed ones, without ever being numbers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transformers_api.engine.stored_weights import FLOATS, StoredMatrix, StoredWeights
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.blocks import KINDS, Blocks
from transformers_api.kernels.modules.linear import Matrix
from transformers_api.kernels.modules.replace import is_embedding
from transformers_api.kernels.modules.streamed import StreamedEmbedding, StreamedLinear

BYTES = {"int8": 34 / 32, "int4": 20 / 32}  # of a packed weight


@dataclass(frozen=True)
class FileMatrix:
    """Meets Source: a matrix of a file."""

    library: Library
    stored: StoredMatrix
    weights: StoredWeights

    @property
    def shape(self) -> tuple[int, int]:
        """See Source."""
        return self.stored.shape

    @property
    def width(self) -> str | None:
        """See Source. int8 for types that the kernels do not read."""
        if self.stored.floats() is not None:
            return None
        return KINDS[self.stored.kind][1] if self.stored.kind in KINDS else "int8"

    def matrix(self) -> Matrix:
        """See Source."""
        stored = self.stored
        if (floats := stored.floats()) is not None:
            return floats
        if stored.kind in KINDS:
            return Blocks(stored.memory, stored.kind, stored.shape, stored.order)
        dense = self.weights.dequantize(stored.memory, stored.kind, stored.shape)
        return dense if stored.order is None else dense[stored.order]

    def rows(self, indices: Tensor) -> Tensor:
        """See Source."""
        matrix = self.matrix()
        return (
            matrix.gather(self.library, indices) if isinstance(matrix, Blocks) else matrix[indices]
        )

    def release(self) -> None:
        """See Source."""
        self.stored.release()


def fill_streamed(library: Library, model: Any, stored: StoredWeights, dtype: torch.dtype) -> None:
    """Put layers that read their weights from the file in the place of the model's large ones.

    All else is filled with numbers.
    """
    stored.dequantize = by_kernels(library, stored)
    sources: dict[int, FileMatrix] = {}
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        name = f"{path}.weight"
        if name in stored and isinstance(weight, nn.Parameter) and _is_streamable(module):
            matrix = stored.matrix(name)
            if matrix is not None:
                sources[id(weight)] = FileMatrix(library, matrix, stored)
    for module in list(model.modules()):
        for leaf, child in list(module.named_children()):
            source = sources.get(id(getattr(child, "weight", None)))
            if source is not None and _is_streamable(child):
                setattr(module, leaf, _streamed(child, source, dtype))
    stored.fill(model, dtype)


def packed_size(types: Mapping[str, int], float_bytes: int) -> int:
    """The bytes that so many weights of ggml's types take once they are packed."""
    sizes = {kind: BYTES[width] for kind, (_, width) in KINDS.items()}
    plain = dict.fromkeys(FLOATS, float_bytes)
    return int(sum(n * (plain | sizes).get(kind, BYTES["int8"]) for kind, n in types.items()))


def by_kernels(library: Library, stored: StoredWeights) -> Any:
    """``dequantize`` by the kernels, where they read a type."""
    other = stored.dequantize

    def dequantize(memory: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
        if kind not in KINDS:
            return other(memory, kind, shape)
        return Blocks(memory, kind, shape).rows(library, 0, shape[0])

    return dequantize


def _is_streamable(module: Any) -> bool:
    return type(module) in (nn.Linear, Conv1D) or is_embedding(module)


def _streamed(layer: Any, source: FileMatrix, dtype: torch.dtype) -> nn.Module:
    if is_embedding(layer):
        made: nn.Module = StreamedEmbedding(source, dtype, getattr(layer, "embed_scale", None))
    else:
        made = StreamedLinear(source, layer.bias)
    return made.train(layer.training)
