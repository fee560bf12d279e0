"""Layers whose weights stay in their file: to ask a model for its own logits before it is packed.

Weights become numbers a few rows at a time, when they are multiplied with, and are forgotten.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from transformers_api.kernels.modules.linear import Matrix, scale_of

AT_ONCE_BYTES = 32 << 20  # of float32


class Source(Protocol):
    """A matrix (out, in) that lies somewhere else."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def width(self) -> str | None:
        """The kind of PackedWeight that keeps most of it; None where its numbers are plain ones."""
        ...

    def matrix(self) -> Matrix:
        """The weights for a PackedWeight. Valid until ``release``."""
        ...

    def rows(self, indices: Tensor) -> Tensor:
        """The rows ``indices`` (…) as (…, in)."""
        ...

    def release(self) -> None:
        """Give back what memory it took."""
        ...


def _shape(source: Source) -> Tensor:
    return torch.empty(source.shape, device="meta")


class StreamedLinear(nn.Module):
    """A Linear, or a Conv1D, over a source."""

    def __init__(self, source: Source, bias: Any) -> None:
        super().__init__()
        self.source = source
        self.out_features, self.in_features = source.shape
        self.weight = _shape(source)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (…, in) to (…, out)."""
        at_once = max(AT_ONCE_BYTES // (4 * self.in_features), 1)
        rows = torch.split(torch.arange(self.out_features), at_once)
        parts = [linear(x, self.source.rows(some).to(x.dtype)) for some in rows]
        self.source.release()
        product = torch.cat(parts, dim=-1)
        return product if self.bias is None else product + self.bias


class StreamedEmbedding(nn.Module):
    """An Embedding over a source. ``scale``: what all numbers are multiplied with."""

    scale: Tensor | None

    def __init__(self, source: Source, dtype: torch.dtype, scale: Any = None) -> None:
        super().__init__()
        self.source = source
        self.num_embeddings, self.embedding_dim = source.shape
        self.weight = _shape(source)
        self.dtype = dtype
        self.register_buffer("scale", scale_of(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``ids`` (…) to (…, embedding_dim)."""
        rows = self.source.rows(ids).to(self.dtype)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)
