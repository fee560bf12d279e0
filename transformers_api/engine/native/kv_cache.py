"""The slot cache as the kernels write and read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.kv_cache import SlotCache, SlotLayer
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.attention import code_bytes, write_cache
from transformers_api.kernels.modules.own_attention import cached


class NativeLayer(SlotLayer):  # type: ignore[no-untyped-call]
    """K and V of one layer, of the cache's dtype whatever the model computes in.

    Rows of both are as wide as the wider of them, for the attention kernel; the rest stays zero. In
    a cache of codes they are those (int8) where K and V are equally wide; see ``numbers_of``.
    """

    cache: NativeCache
    is_latent = False  # expanded keys and values are written later than the model says

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See SlotLayer. Of latent attention nothing is written: see latent.py."""
        if self.is_latent:
            return key_states, value_states
        return self.write(key_states, value_states)

    def write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write K, V (B, H, T, D) from each row's start on; views of all so far."""
        states = key_states, value_states
        if not self.is_initialized:
            self._initialize(states)
        cache = self.cache
        for rows, new in zip(self.rows, states, strict=True):
            write_cache(cache.library, new, rows[cache.window], cache.starts, cache.cache_rows)
        keys, values = (
            rows[cache.window, :, : cache.context, : new.shape[3]]
            for rows, new in zip(self.rows, states, strict=True)
        )
        return (cached(keys), cached(values)) if cache.shows_symbols else (keys, values)

    def _initialize(self, states: tuple[Tensor, Tensor]) -> None:
        if self.likes:
            self.cache.allocate()
            return
        sizes, dtype = [each.shape[3] for each in states], self.cache.dtype
        size = max(sizes)
        if self.cache.holds_codes and not self.is_latent and size == min(sizes):
            size, dtype = code_bytes(size), torch.int8
        self.begin(tuple(torch.empty(0, s.shape[1], 0, size, dtype=dtype) for s in states))


class NativeCache(SlotCache):
    """A SlotCache of ``dtype``. Token n goes to ``starts[n]`` of the row ``cache_rows[n]``.

    ``holds_codes``: K and V in int8, where that is possible.
    """

    slots: list[NativeLayer]  # type: ignore[assignment]
    dtype: torch.dtype
    shows_symbols = False  # see kernels/modules/own_attention.py

    def __init__(
        self,
        library: Library,
        num_layers: int,
        max_rows: int,
        max_length: int,
        dtype: torch.dtype,
        latent: frozenset[int] = frozenset(),
        holds_codes: bool = False,
    ) -> None:
        self.library = library
        self.dtype = dtype
        self.holds_codes = holds_codes
        self.starts = self.cache_rows = torch.zeros(0, dtype=torch.int64)
        self._most = max_rows, max_length
        super().__init__(num_layers, max_rows, max_length, NativeLayer)
        self.latent = latent  # indices of layers
        for index in latent:
            layer: Any = self.layers[index]
            layer.is_latent = True

    def bind_rows(self, starts: Tensor, cache_rows: Tensor, context: int) -> None:
        """Aim the next forward at one token of each of ``cache_rows``, which are the first ones."""
        self.window = slice(0, len(cache_rows))
        self.context = context
        self.starts, self.cache_rows = starts, cache_rows

    def scratch(self, rows: int, length: int) -> NativeCache:
        """An empty one of the same kind."""
        made = self._like(rows, length)
        made.reserve(rows, length)
        return made

    def anew(self) -> NativeCache:
        """One as this was at first: without tokens, and without a budget."""
        made = self._like(*self._most)
        made.shaped_like(self)
        return made

    @property
    def has_codes(self) -> bool:
        """True where keys or values are int8; a forward has shown their shape."""
        return any(like.dtype == torch.int8 for layer in self.slots for like in layer.likes)

    def _like(self, rows: int, length: int) -> NativeCache:
        sizes = len(self.slots), rows, length
        return NativeCache(self.library, *sizes, self.dtype, self.latent, self.holds_codes)

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
