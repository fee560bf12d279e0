"""Layers whose weights stay in their file: to ask a model for its own logits before it is packed.

Weights become numbers a few rows at a time, when they are multiplied with, and are forgotten.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from transformers_api.kernels.modules.blocks import Matrix
from transformers_api.kernels.modules.linear import scale_of

AT_ONCE_BYTES = 2 << 20  # of float32: a core has it in its cache, and the heap has it at hand


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

    @property
    def exact(self) -> str | None:
        """The kind for a table of words that no layer shares, where its numbers are to stay."""
        ...

    def matrix(self) -> Matrix:
        """The weights for a PackedWeight. Valid until ``release``."""
        ...

    def product(self, x: Tensor) -> Tensor | None:
        """The product of ``x`` (…, in) with all rows where they lie; None where they are made."""
        ...

    def rows(self, first: int, count: int) -> Tensor:
        """The rows from ``first`` on, (count, in)."""
        ...

    def gather(self, indices: Tensor) -> Tensor:
        """The rows ``indices`` (…) as (…, in)."""
        ...

    def release(self) -> None:
        """Give back what memory it took."""
        ...


def _shape(source: Source) -> Tensor:
    return torch.empty(source.shape, device="meta")


def streamed_product(source: Source, x: Tensor) -> Tensor:
    """The product of ``x`` (…, in) with a source's rows: (…, out)."""
    has_gradient = x.requires_grad and torch.is_grad_enabled()
    if not has_gradient and (product := source.product(x)) is not None:
        source.release()
        return product
    out, width = source.shape
    at_once = max(AT_ONCE_BYTES // (4 * width), 1)
    parts = [
        linear(x, source.rows(first, min(at_once, out - first)).to(x.dtype))
        for first in range(0, out, at_once)
    ]
    source.release()
    return torch.cat(parts, dim=-1)


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
        product = streamed_product(self.source, x)
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
        rows = self.source.gather(ids).to(self.dtype)
        self.source.release()
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)
