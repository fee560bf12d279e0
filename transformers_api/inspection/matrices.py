"""Attention of given tokens: windows of the matrices, every head at a glance, rollout.

Rows are made chunk by chunk and reduced at once: no n x n matrix of every head is ever there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from transformers_api.errors import AttentionUnavailable, PromptTooLarge
from transformers_api.inspection.attention import AttentionSource, ComputedWeights, Weights
from transformers_api.inspection.attention_edits import edited_rows
from transformers_api.inspection.base import Array, AttentionMode, AttentionWindow, HeadGrid, Heads
from transformers_api.inspection.examination import asked_weights
from transformers_api.inspection.reading import SeenEnough, Way, read, unarmed

QUERIES = 128  # rows that are there at once, of all heads of a layer
ROLLOUT_BYTES = 1 << 29  # the products of every layer, float32
# Told of (layer, weights, position of the first query, of the one after the last).
Taker = Callable[[int, Weights, int, int], None]


def read_attention(
    model: Any,
    way: Way,
    source: AttentionSource,
    ids: list[int],
    take: Taker,
    rows: tuple[int, int] | None = None,
    only: int | None = None,
) -> Generator[None, None, None]:
    """Tell ``take`` of every layer, chunk by chunk; only of chunks with queries of ``rows``.

    Where one layer is wanted ``only``, those after it are not run at all.
    """
    start, stop = rows or (0, len(ids))
    tokens = torch.tensor([ids], device=model.device)
    if source.mode is AttentionMode.LEGACY:
        with way.armed(model, unarmed)(0, len(ids)):
            weights_of = asked_weights(model, tokens)
        for layer in weights_of if only is None else [only]:
            take(layer, ComputedWeights(weights_of[layer], source.has_sinks), 0, len(ids))
        return

    def arm(first: int, last: int) -> AbstractContextManager[None]:
        has_queries = last > start and first < stop
        if not has_queries and only is None:
            return unarmed(first, last)

        def watcher(layer: int, weights: Weights) -> None:
            if has_queries and only in (None, layer):
                take(layer, weights, first, last)
            if layer == only:
                raise SeenEnough

        return source.watched(model, watcher)

    for chunk in read(model, tokens, way.width(), way.armed(model, arm)):
        yield
        if chunk.stop >= stop:
            return


def attention(
    model: Any,
    way: Way,
    source: AttentionSource,
    ids: list[int],
    layer: int,
    heads: Heads,
    rows: tuple[int, int],
    cols: tuple[int, int],
) -> Generator[None, None, AttentionWindow]:
    """See ``base.Inspector``."""
    parts: list[tuple[Tensor, Tensor | None]] = []
    only = [heads] if isinstance(heads, int) else None

    def take(_layer: int, weights: Weights, first: int, last: int) -> None:
        queries = slice(max(rows[0] - first, 0), min(rows[1], last) - first)
        shares, sink = _rows(way, layer, weights, queries, (first, last), only)
        parts.append(_reduced(_columns(shares, last, cols), sink, heads))

    yield from read_attention(model, way, source, ids, take, rows, layer)
    sinks = [sink for _, sink in parts if sink is not None]
    return AttentionWindow(
        weights=_array(torch.cat([shares for shares, _ in parts], dim=1)),
        sink=_array(torch.cat(sinks, dim=1)) if sinks else None,
    )


def _rows(
    way: Way,
    layer: int,
    weights: Weights,
    queries: slice,
    chunk: tuple[int, int],
    heads: list[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Of the tokens of a chunk [first, last), with what edits make of them."""
    rows, sinks = weights.rows(0, queries, heads)
    if way.edits is None:
        return rows, sinks
    key_start = chunk[1] - rows.shape[-1]
    first = chunk[0] + queries.start
    return edited_rows(way.edits.edits, layer, weights, (rows, sinks), heads, first, key_start)


def _columns(shares: Tensor, stop: int, cols: tuple[int, int]) -> Tensor:
    """Keys [start, stop) of ``shares`` (H, R, S), whose last key is the token before ``stop``.

    Keys that were not there, before a window or after the queries, have 0.
    """
    first = stop - shares.shape[-1]
    here = shares[..., max(cols[0] - first, 0) : max(cols[1] - first, 0)]
    before = max(min(first, cols[1]) - cols[0], 0)
    after = cols[1] - cols[0] - before - here.shape[-1]
    return torch.nn.functional.pad(here, (before, after))


def _reduced(shares: Tensor, sink: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor | None]:
    if heads == "mean":
        return shares.mean(0, True), None if sink is None else sink.mean(0, True)
    if heads == "max":
        return shares.amax(0, True), None if sink is None else sink.amax(0, True)
    return shares, sink


# -- every head at a glance

_STATISTICS = ("entropy", "distance", "first", "previous", "itself")


@dataclass(slots=True)
class _Sums:
    """Of one layer, over all queries so far."""

    statistics: Tensor  # (5, H)
    sink: Tensor | None  # (H,)
    thumbs: Tensor | None  # (H, size, size)


def grid(
    model: Any,
    way: Way,
    source: AttentionSource,
    ids: list[int],
    thumb: int,
    layers: int,
    heads: int,
) -> Generator[None, None, HeadGrid]:
    """See ``base.Inspector``. A text shorter than ``thumb`` has pictures of its own size."""
    count = len(ids)
    size = min(thumb, count)
    sums: dict[int, _Sums] = {}

    def take(layer: int, weights: Weights, first: int, last: int) -> None:
        for start in range(first, last, QUERIES):
            stop = min(start + QUERIES, last)
            own = slice(start - first, stop - first)
            shares, sink = _rows(way, layer, weights, own, (first, last))
            shares = _columns(shares, last, (0, last))
            _add(sums, layer, shares, sink, start, size, count)

    yield from read_attention(model, way, source, ids, take)
    nothing = torch.full((heads,), torch.nan)
    tables = [
        torch.stack(
            [sums[at].statistics[kind] / count if at in sums else nothing for at in range(layers)]
        )
        for kind in range(len(_STATISTICS))
    ]
    sinks = [sums[at].sink if at in sums else None for at in range(layers)]
    return HeadGrid(
        **{name: _array(table) for name, table in zip(_STATISTICS, tables, strict=True)},
        sink=_sinks(sinks, count, nothing),
        thumbs=_thumbs(sums, layers, heads, size),
    )


def _add(
    sums: dict[int, _Sums],
    layer: int,
    shares: Tensor,
    sink: Tensor | None,
    start: int,
    size: int,
    count: int,
) -> None:
    """``shares`` (H, R, S) of queries from ``start`` on, over keys from 0 on."""
    _, queries, keys = shares.shape
    places = torch.arange(start, start + queries, device=shares.device)
    distance = (places[:, None] - torch.arange(keys, device=shares.device)).abs().float()
    before = (places - 1).clamp_min(0)[None, :, None].expand(len(shares), -1, 1)
    own = places[None, :, None].expand(len(shares), -1, 1)
    previous = shares.gather(-1, before)[..., 0] * (places > 0)  # the first has none before it
    statistics = torch.stack(
        [
            torch.special.entr(shares).sum((-1, -2)),
            (shares * distance).sum((-1, -2)),
            shares[..., 0].sum(-1),
            previous.sum(-1),
            shares.gather(-1, own).sum((-1, -2)),
        ]
    )
    rows, cols = (_bins(size, count, at, n, shares) for at, n in ((start, queries), (0, keys)))
    picture = rows.T @ shares @ cols if size else None
    so_far = sums.get(layer)
    if so_far is None:
        sums[layer] = _Sums(statistics, None if sink is None else sink.sum(-1), picture)
        return
    so_far.statistics += statistics
    if sink is not None and so_far.sink is not None:
        so_far.sink += sink.sum(-1)
    if picture is not None and so_far.thumbs is not None:
        so_far.thumbs += picture


def _bins(size: int, count: int, start: int, length: int, like: Tensor) -> Tensor:
    """(length, size): which cell of a picture each position falls in, weighted to give means."""
    if not size:
        return like.new_zeros(length, 0)
    cells = torch.arange(count, device=like.device) * size // count
    shares = torch.nn.functional.one_hot(cells, size).float()
    return (shares / shares.sum(0))[start : start + length]


def _sinks(sums: Sequence[Tensor | None], count: int, nothing: Tensor) -> Array | None:
    if all(each is None for each in sums):
        return None
    return _array(torch.stack([nothing if each is None else each / count for each in sums]))


def _thumbs(sums: dict[int, _Sums], layers: int, heads: int, size: int) -> Array | None:
    if not size:
        return None
    nothing = torch.full((heads, size, size), torch.nan)
    pictures = [sums[layer].thumbs if layer in sums else nothing for layer in range(layers)]
    return _array(torch.stack([each for each in pictures if each is not None]))


# -- rollout


def rollout(
    model: Any,
    way: Way,
    source: AttentionSource,
    ids: list[int],
    layers: tuple[int, int],
    drop_first: bool,
) -> Generator[None, None, Array]:
    """See ``base.Inspector``."""
    count, lowest = len(ids), layers[0]
    products = [
        torch.zeros(count, count, device=model.device) for _ in range(layers[1] - lowest + 1)
    ]

    def take(layer: int, weights: Weights, first: int, last: int) -> None:
        if not lowest <= layer <= layers[1]:
            return
        shares, _ = _rows(way, layer, weights, slice(0, last - first), (first, last))
        read_from = _columns(shares, last, (0, last)).mean(0)  # (R, last)
        if drop_first:
            read_from = _without_first(read_from)
        mixed = read_from / 2
        places = torch.arange(last - first, device=mixed.device)
        mixed[places, places + first] += 0.5
        below = products[layer - lowest - 1][:last, :last] if layer > lowest else None
        products[layer - lowest][first:last, :last] = mixed if below is None else mixed @ below

    yield from read_attention(model, way, source, ids, take)
    return _array(products[-1])


def _without_first(shares: Tensor) -> Tensor:
    """Rows (R, K) as if nothing were read from the first token; those of nothing else stay."""
    rest = shares[:, 1:].sum(-1, keepdim=True)
    scaled = shares / rest.clamp_min(1e-9)
    scaled[:, 0] = 0
    return torch.where(rest > 1e-9, scaled, shares)


def check_rollout(count: int, layers: int, available: int) -> None:
    """Raise AttentionUnavailable unless each layer attends, PromptTooLarge for a long text."""
    if available < layers:
        raise AttentionUnavailable(
            f"rollout needs attention in every layer; {available} of {layers} have it"
        )
    if count * count * layers * 4 > ROLLOUT_BYTES:
        most = int((ROLLOUT_BYTES / 4 / layers) ** 0.5)
        raise PromptTooLarge(f"Prompt too large to roll out: {count} tokens (max {most})")


def _array(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    return tensor.float().cpu().numpy()
