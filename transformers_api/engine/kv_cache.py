"""The KV cache: one row per slot, for any transformers model that uses the Cache interface."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

MIN_LENGTH = 256  # tokens; rows grow in powers of two from here
CACHE_LINE = 64  # bytes


class SlotLayer(CacheLayerMixin):
    """K and V of one layer for all slots: (rows, H, length, D) each."""

    is_sliding = False  # windows are in the mask: rows keep all tokens, so any prefix can be reused

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.likes: tuple[Tensor, ...] = ()  # empty K and V, once a forward has shown their shape
        self.room: tuple[Tensor, ...] = ()  # K and V of all rows that there is memory for
        self.rows: tuple[Tensor, ...] = ()  # of those that are in use

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory, for the shape of the first K and V."""
        if self.likes:
            self.cache.allocate()
            return
        dtype = self.cache.dtype or key_states.dtype
        self.begin(tuple(s[:0, :, :0].to(dtype, copy=True) for s in (key_states, value_states)))

    def begin(self, likes: tuple[Tensor, ...]) -> None:
        """Take memory for K and V like these empty ones."""
        self.likes = likes
        rows = self.cache.capacity + self.cache.spare
        self.aim(tuple(laid_out(self.likes, rows, self.cache.length)))

    def aim(self, room: tuple[Tensor, ...]) -> None:
        """Use the first rows of this memory."""
        self.room = room
        self.rows = tuple(each[: self.cache.rows + self.cache.spare] for each in room)
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
        return keys[cache.window, :, : cache.context], values[cache.window, :, : cache.context]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that attention sees, offset)."""
        return self.cache.context, 0

    def get_seq_length(self) -> int:
        """Always 0: positions are given with each forward, they differ from row to row."""
        return 0

    def get_max_length(self) -> int:
        """Tokens per row."""
        return self.cache.length


class IndexedLayer(SlotLayer):  # type: ignore[no-untyped-call]
    """K and V of a layer with an index of what to attend to, and that index' keys."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__(cache)
        self.index = SlotLayer(cache)

    def update_indexer(self, states: Tensor) -> Tensor:
        """Write the index' keys (B, T, D); all so far (B, S, D)."""
        keys = states[:, None]
        return self.index.update(keys, keys[..., :1])[0][:, 0]  # a cache has pairs


class SlotCache(Cache):
    """Rows of K and V, grown and shrunk within a budget of bytes.

    ``bind`` aims the next forward at a range of rows. The budget counts rows x length of those in
    use, whatever is in them. On a CPU there is room for all the rows that it allows: one more
    takes memory when it is written, and none is moved for it.
    """

    reuses_prefixes = True
    in_pieces = True  # a prompt may be read in several passes
    dtype: torch.dtype | None = None  # None: what the model computes in
    spare = 0  # rows behind those of the slots

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        max_length: int,
        layer: Callable[[Any], SlotLayer] = SlotLayer,
        indexed: Collection[int] = (),
    ) -> None:
        self.max_rows = max_rows
        self.max_length = max_length
        self.budget_tokens = max_rows * max_length
        self._token_bytes = 0
        self.rows = self.capacity = 1
        self.length = min(MIN_LENGTH, max_length)
        self.window = slice(0, 0)
        self.context = 0
        self.span: slice | None = None
        self.row_index = self.positions = torch.empty(0, dtype=torch.long)
        layers = [IndexedLayer(self) if i in indexed else layer(self) for i in range(num_layers)]
        self.slots = layers + [each.index for each in layers if isinstance(each, IndexedLayer)]
        super().__init__(layers=list(layers))

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

    def reserve(
        self, rows: int, length: int, prefixes: Mapping[int, int] | None = None
    ) -> tuple[int, int] | None:
        """Make room for ``rows`` rows of ``length`` tokens, within the budget.

        ``prefixes``: how many first tokens of each row are worth keeping; by default all. Gives the
        rows and the length that there are now: what lay beyond is lost. None when the room cannot
        be had.
        """
        if rows <= self.rows and length <= self.length:
            return self.rows, self.length
        doubled = min(max(power_of_two(length), MIN_LENGTH), self.max_length)
        tight = min(-(-length // MIN_LENGTH) * MIN_LENGTH, self.max_length)
        for width in (max(self.length, doubled), doubled, tight):
            if rows <= self.max_rows and rows * width <= self.budget_tokens:
                room = min(self.max_rows, self.budget_tokens // width)
                self._resize(min(max(power_of_two(rows), self.rows), room), width, prefixes)
                return self.rows, self.length
        return None

    def bind(self, first: int, positions: Tensor, context: int) -> None:
        """Aim the next forward at rows first..first+B.

        ``positions`` (B, T) of the new tokens; ``context`` = the largest of them + 1.
        """
        count, width = positions.shape
        self.window = slice(first, first + count)
        self.context = context
        self.span = slice(context - width, context) if count == 1 else None
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

    def read_row(self, row: int, length: int) -> list[Tensor]:
        """Copies (H, length, D) of the first tokens of a row, layer by layer."""
        return [rows[row, :, :length].clone() for layer in self.slots for rows in layer.rows]

    def write_row(self, row: int, states: Sequence[Tensor]) -> None:
        """Write what ``read_row`` gave."""
        targets = [rows for layer in self.slots for rows in layer.rows]
        for rows, state in zip(targets, states, strict=True):
            rows[row, :, : state.shape[1]] = state

    def wipe(self, row: int) -> None:
        """Zero a row: a NaN left in it would reach its next sequence through masked attention."""
        for layer in self.slots:
            for rows in layer.rows:
                rows[row].zero_()

    def clear(self) -> None:
        """Let the memory go and begin anew, whatever state it was in."""
        self._token_bytes = self.token_bytes  # which only rows show
        for layer in self.slots:
            layer.room, layer.rows, layer.is_initialized = (), (), False
        self.rows = self.capacity = 1
        self.length = min(MIN_LENGTH, self.max_length)

    def allocate(self) -> None:
        """Take memory for all layers whose shapes are known."""
        self._lay_out({})

    def room_for(self, rows: int) -> int:
        """Return the number of rows to have memory for where ``rows`` are needed."""
        if self._shaped[0].likes[0].device.type != "cpu":  # it would be taken at once
            return rows
        return max(rows, min(self.max_rows, self.budget_tokens // self.length))

    @property
    def _shaped(self) -> list[SlotLayer]:
        return [layer for layer in self.slots if layer.likes]

    def _resize(self, rows: int, length: int, prefixes: Mapping[int, int] | None) -> None:
        prefixes = dict.fromkeys(range(self.rows), self.length) if prefixes is None else prefixes
        is_there = length == self.length and rows <= self.capacity
        self.rows, self.length = rows, length
        used = [layer for layer in self.slots if layer.is_initialized]
        if not used:
            self.capacity = rows
        elif is_there:
            for layer in used:
                layer.aim(layer.room)
        else:
            self._lay_out(prefixes)

    def _lay_out(self, prefixes: Mapping[int, int]) -> None:
        self.capacity = self.room_for(self.rows)
        likes = [like for layer in self._shaped for like in layer.likes]
        fresh = laid_out(likes, self.capacity + self.spare, self.length)
        try:
            fresh = chain([next(fresh)], fresh)
        except OSError:  # a system that promises no memory beyond what it has
            self.capacity = self.rows
            fresh = laid_out(likes, self.capacity + self.spare, self.length)
        for layer in self._shaped:
            old = layer.rows or layer.likes
            layer.aim(tuple(moved(each, next(fresh), prefixes) for each in old))


def power_of_two(size: int) -> int:
    """Round up, to bound how often rows are copied."""
    return 1 << (size - 1).bit_length()


def laid_out(likes: Sequence[Tensor], rows: int, length: int) -> Iterator[Tensor]:
    """Zeros (rows, H, length, D) for each of ``likes``: a stale NaN would get through a mask.

    On a CPU they share a piece of memory, in which a row lies together. Of it the system gives what
    is written, a small page at a time: large ones would take much of a row for its first tokens.
    """
    if likes[0].device.type != "cpu":
        for like in likes:  # one at a time: who moves there can give the old one back first
            yield like.new_zeros(rows, like.shape[1], length, like.shape[3])
        return
    sizes = [like.shape[1] * length * like.shape[3] * like.element_size() for like in likes]
    *starts, row = accumulate((-(-n // CACHE_LINE) * CACHE_LINE for n in sizes), initial=0)
    memory = mmap.mmap(-1, rows * row, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # where there are no large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    for like, start in zip(likes, starts, strict=True):
        _, heads, _, width = like.shape
        item = like.element_size()
        part = torch.frombuffer(memory, dtype=like.dtype, offset=start)
        yield part.as_strided((rows, heads, length, width), (row // item, length * width, width, 1))


def moved(old: Tensor, new: Tensor, prefixes: Mapping[int, int]) -> Tensor:
    """``new`` (rows, H, length, D) with so many first tokens of these rows of ``old``."""
    for row, tokens in prefixes.items():
        if row < min(len(old), len(new)):
            new[row, :, :tokens] = old[row, :, : min(tokens, new.shape[2])]
    return new
