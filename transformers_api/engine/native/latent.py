"""Multi-head latent attention (MLA) over a cache of keys and values as the kernel reads them.

transformers caches what keys and values are computed from and expands all of it in every pass. Here
each token is expanded once, and what comes out is cached.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from transformers_api.engine.native.kv_cache import NativeCache

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_cache: contextvars.ContextVar[NativeCache | None] = contextvars.ContextVar("cache", default=None)


@contextmanager
def expanding_into(cache: NativeCache) -> Iterator[None]:
    """While it lasts, layers of latent attention write expanded keys and values into ``cache``."""
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)


def latent_layers(model: Any) -> frozenset[int]:
    """Prepare the layers of latent attention for ``expanding_into``; returns their indices."""
    layers = [m for m in model.modules() if hasattr(m, "expand_kv") and hasattr(m, "layer_idx")]
    for layer in layers:
        layer.expand_kv = partial(_expand, layer.layer_idx, layer.expand_kv)
    return frozenset(layer.layer_idx for layer in layers)


def _expand(layer: int, expand: Expand, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, S, D) of all tokens so far; ``latent`` and ``rotated`` of the new."""
    keys, values = expand(latent, rotated)
    cache = _cache.get()
    if cache is None:
        return keys, values
    slots: Any = cache.layers[layer]
    written: tuple[Tensor, Tensor] = slots.write(keys, values)
    return written
