"""The KV cache: one row per slot, for any transformers model that uses the Cache interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

MIN_LENGTH = 256  # tokens; rows grow in powers of two from here
HUGE_PAGE = 2 << 20


class SlotLayer(CacheLayerMixin):
    """K and V of one layer for all slots: (rows, H, length, D) each."""

    is_sliding = False  # windows are in the mask: rows keep all tokens, so any prefix can be reused

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.rows: tuple[Tensor, ...] = ()  # K and V, once the first forward has shown their shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shape of the first K and V."""
        size = self.cache.rows, self.cache.length
        self.rows = zeros(key_states, *size), zeros(value_states, *size)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write K, V (B, H, T, D) of the bound positions; views (B, H, S, D) of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, (keys, values) = self.cache, self.rows
        if cache.span is not None:  # one sequence: a contiguous write
            keys[cache.window, :, cache.span] = key_states
            values[cache.window, :, cache.span] = value_states
        else:
            keys[cache.row_index, :, cache.positions] = key_states.transpose(1, 2)
            values[cache.row_index, :, cache.positions] = value_states.transpose(1, 2)
        return keys[cache.window, :, : cache.seen], values[cache.window, :, : cache.seen]

    def resize(self, rows: int, length: int) -> None:
        """Change the allocation; what fits is kept."""
        self.rows = tuple(resized(old, rows, length) for old in self.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that attention sees, offset)."""
        return self.cache.seen, 0

    def get_seq_length(self) -> int:
        """Always 0: positions are given with each forward, they differ from row to row."""
        return 0

    def get_max_length(self) -> int:
        """Tokens per row."""
        return self.cache.length


class SlotCache(Cache):
    """Rows of K and V, grown and shrunk within a budget of bytes.

    ``bind`` aims the next forward at a range of rows. The budget counts rows x length of the
    allocation, whatever is in it.
    """

    reuses_prefixes = True

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        max_length: int,
        layer: Callable[[Any], SlotLayer] = SlotLayer,
    ) -> None:
        self.max_rows = max_rows
        self.max_length = max_length
        self.budget_tokens = max_rows * max_length
        self._token_bytes = 0
        self.rows = 1
        self.length = min(MIN_LENGTH, max_length)
        self.window = slice(0, 0)
        self.seen = 0
        self.span: slice | None = None
        self.row_index = self.positions = torch.empty(0, dtype=torch.long)
        self.slots = [layer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V per token; 0 before the first forward."""
        tensors = [rows for layer in self.slots for rows in layer.rows]
        if tensors:
            sizes = (rows.shape[1] * rows.shape[3] * rows.element_size() for rows in tensors)
            self._token_bytes = sum(sizes)
        return self._token_bytes

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(rows.nbytes for layer in self.slots for rows in layer.rows)

    @property
    def budget_bytes(self) -> int:
        """Bytes that may be allocated."""
        return self.token_bytes * self.budget_tokens

    def set_budget(self, budget_bytes: int) -> int:
        """Bound the allocation; gives the longest sequence. Call after a forward."""
        self.budget_tokens = max(budget_bytes // max(self.token_bytes, 1), MIN_LENGTH)
        self.max_length = min(self.max_length, self.budget_tokens)
        return self.max_length

    def reserve(self, rows: int, length: int) -> tuple[int, int] | None:
        """Make room for ``rows`` rows of ``length`` tokens, within the budget.

        Gives the rows and the length that there are now: what lay beyond is lost. None when the
        room cannot be had.
        """
        if rows <= self.rows and length <= self.length:
            return self.rows, self.length
        doubled = min(max(power_of_two(length), MIN_LENGTH), self.max_length)
        tight = min(-(-length // MIN_LENGTH) * MIN_LENGTH, self.max_length)
        for width in (max(self.length, doubled), doubled, tight):
            if rows <= self.max_rows and rows * width <= self.budget_tokens:
                room = min(self.max_rows, self.budget_tokens // width)
                self._resize(min(max(power_of_two(rows), self.rows), room), width)
                return self.rows, self.length
        return None

    def bind(self, first: int, positions: Tensor, seen: int) -> None:
        """Aim the next forward at rows first..first+B.

        ``positions`` (B, T) of the new tokens; ``seen`` = the largest of them + 1.
        """
        count, width = positions.shape
        self.window = slice(first, first + count)
        self.seen = seen
        self.span = slice(seen - width, seen) if count == 1 else None
        if count > 1:
            self.positions = positions
            self.row_index = torch.arange(first, first + count, device=positions.device)[:, None]

    def copy(self, src: int, dst: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row."""
        for layer in self.slots:
            for rows in layer.rows:
                rows[dst, :, :length] = rows[src, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first ``length`` tokens of two rows."""
        for layer in self.slots:
            for rows in layer.rows:
                held = rows[a, :, :length].clone()
                rows[a, :, :length] = rows[b, :, :length]
                rows[b, :, :length] = held

    def wipe(self, row: int) -> None:
        """Zero a row: a NaN left in it would reach its next sequence through masked attention."""
        for layer in self.slots:
            for rows in layer.rows:
                rows[row].zero_()

    def clear(self) -> None:
        """Let the allocation go and begin anew, whatever state it was in."""
        self._token_bytes = self.token_bytes  # which only an allocation shows
        for layer in self.slots:
            layer.rows, layer.is_initialized = (), False
        self.rows, self.length = 1, min(MIN_LENGTH, self.max_length)

    def _resize(self, rows: int, length: int) -> None:
        for layer in self.slots:  # one at a time: the transient extra is one layer's share
            layer.resize(rows, length)
        self.rows, self.length = rows, length


def power_of_two(size: int) -> int:
    """Round up, to bound how often rows are copied."""
    return 1 << (size - 1).bit_length()


def zeros(like: Tensor, rows: int, length: int) -> Tensor:
    """(rows, H, length, D) of zeros: a stale NaN would get through a mask.

    On a CPU the pages come from calloc, so that memory is taken when it is first written. numpy
    asks for large ones from twice their size on: with small ones a core looks for keys in vain.
    """
    shape = (rows, like.shape[1], length, like.shape[3])
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    pages = numpy.zeros(size if size < HUGE_PAGE else max(size, 2 * HUGE_PAGE), numpy.uint8)
    return torch.from_numpy(pages[:size]).view(like.dtype).view(shape)


def resized(old: Tensor, rows: int, length: int) -> Tensor:
    """Keys or values (rows, H, length, D) in a new allocation; what fits is kept."""
    new = zeros(old, rows, length)
    kept_rows, kept_length = min(rows, old.shape[0]), min(length, old.shape[2])
    new[:kept_rows, :, :kept_length] = old[:kept_rows, :, :kept_length]
    return new
