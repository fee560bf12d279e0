"""Positions that a model counts itself from the length of a cache, which rows here have each.

Decoders of BART's family take no positions. A pass of several sequences tells them. Those of
BLOOM's count in a mask of two dimensions, which such a pass does not have. Llama 4's layers without
a rope count to scale their queries.
"""

from __future__ import annotations

import contextvars
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ALIBI = "build_alibi_tensor"  # a function of a model's own code
_positions: contextvars.ContextVar[Tensor] = contextvars.ContextVar("positions")


@contextmanager
def at_positions(positions: Tensor) -> Iterator[None]:
    """While it lasts, passes are of tokens at these positions (B, T)."""
    token = _positions.set(positions)
    try:
        yield
    finally:
        _positions.reset(token)


def follow_positions(model: nn.Module) -> None:
    """Make the model's position embeddings obey ``at_positions``."""
    for module in model.modules():
        is_counter = isinstance(module, nn.Embedding) and type(module) is not nn.Embedding
        if is_counter and "past_key_values_length" in inspect.signature(module.forward).parameters:
            module.forward = partial(_embed, module, module.forward)
        _temper(module)
    for code in {sys.modules[type(module).__module__] for module in model.modules()}:
        builder = getattr(code, ALIBI, None)
        if callable(builder) and not isinstance(builder, partial):
            setattr(code, ALIBI, partial(_alibi, builder))


def _temper(attention: Any) -> None:
    if getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope:
        made = _Tempered(attention.q_proj, attention.floor_scale, attention.attn_scale)
        attention.q_proj, attention.attn_temperature_tuning = made, False


class _Tempered(nn.Module):
    """Queries that grow every ``step`` tokens; positions count from 0 where a pass has none."""

    def __init__(self, projection: nn.Module, step: float, growth: float) -> None:
        super().__init__()
        self.projection = projection
        self.step, self.growth = step, growth

    def forward(self, x: Tensor) -> Tensor:
        """The scaled queries (B, T, H * D) of hidden states (B, T, C)."""
        queries: Tensor = self.projection(x)
        positions = _positions.get(None)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        scale = torch.log1p(torch.floor((positions.float() + 1.0) / self.step)) * self.growth + 1.0
        return (queries * scale[..., None]).to(queries.dtype)


def _embed(module: Any, counted: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    positions = _positions.get(None)
    if positions is None:
        return counted(*args, **kwargs)
    return functional.embedding(positions + getattr(module, "offset", 0), module.weight)


def _alibi(builder: Callable[..., Tensor], mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The bias for a mask (B, S) or (B, 1, T, S): of keys whose positions count from 0."""
    if mask.dim() == 4:
        mask = torch.ones(mask.shape[0], mask.shape[3], dtype=torch.int64, device=mask.device)
    return builder(mask, *args, **kwargs)
