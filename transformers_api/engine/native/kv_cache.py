"""The slot cache as the kernels write and read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.kv_cache import SlotCache, SlotLayer
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.attention import write_cache


class NativeLayer(SlotLayer):  # type: ignore[no-untyped-call]
    """K and V of one layer, of the cache's dtype whatever the model computes in."""

    cache: NativeCache

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See SlotLayer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        for rows, states in zip(self.rows, (key_states, value_states), strict=True):
            write_cache(cache.library, states, rows[cache.window], cache.starts, cache.cache_rows)
        keys, values = self.rows
        return keys[cache.window, :, : cache.context], values[cache.window, :, : cache.context]


class NativeCache(SlotCache):
    """A SlotCache of ``dtype``. Token n goes to ``starts[n]`` of the row ``cache_rows[n]``."""

    slots: list[NativeLayer]  # type: ignore[assignment]
    dtype: torch.dtype

    def __init__(
        self, library: Library, num_layers: int, max_rows: int, max_length: int, dtype: torch.dtype
    ) -> None:
        self.library = library
        self.dtype = dtype
        self.starts = self.cache_rows = torch.zeros(0, dtype=torch.int64)
        self._most = max_rows, max_length
        super().__init__(num_layers, max_rows, max_length, NativeLayer)

    def bind_rows(self, starts: Tensor, cache_rows: Tensor, context: int) -> None:
        """Aim the next forward at one token of each of ``cache_rows``, which are the first ones."""
        self.window = slice(0, len(cache_rows))
        self.context = context
        self.starts, self.cache_rows = starts, cache_rows

    def scratch(self, rows: int, length: int) -> NativeCache:
        """An empty one of the same kind."""
        made = NativeCache(self.library, len(self.slots), rows, length, self.dtype)
        made.reserve(rows, length)
        return made

    def anew(self) -> NativeCache:
        """One as this was at first: without tokens, and without a budget."""
        made = NativeCache(self.library, len(self.slots), *self._most, self.dtype)
        made.shaped_like(self)
        return made

    @property
    def tensors(self) -> list[Tensor]:
        """Keys and values of all rows, layer by layer; allocated if need be."""
        if not self.slots[0].is_initialized:
            self.allocate()
        return [rows for layer in self.slots for rows in layer.rows]

    def shaped_like(self, other: NativeCache) -> None:
        """Take over what a forward has shown to ``other``."""
        self.shape([layer.likes for layer in other.slots])

    def shape(self, likes: list[tuple[Tensor, ...]]) -> None:
        """Take what a forward would show: empty K and V of each layer."""
        for layer, context in zip(self.slots, likes, strict=True):
            layer.likes = context
