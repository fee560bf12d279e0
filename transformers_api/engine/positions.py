"""Position embeddings that count from the length of a cache, which differs from row to row here.

Decoders of BART's family take no positions. A pass of several sequences tells them.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

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


def _embed(module: Any, counted: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    positions = _positions.get(None)
    if positions is None:
        return counted(*args, **kwargs)
    return functional.embedding(positions + getattr(module, "offset", 0), module.weight)
