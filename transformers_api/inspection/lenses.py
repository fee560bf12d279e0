"""Residual streams mapped by a lens; how well what it reads fits what the model says."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from transformers_api.inspection.base import Array
from transformers_api.inspection.lens_maps import DirectionReading, LensFit, LensMaps
from transformers_api.inspection.parts import lens_logits
from transformers_api.inspection.reading import HEAD_ROWS, Way, residuals_at

MOST_STREAMS = 16  # that a direction is tried on
SHARE = 0.1  # of a stream's length, by which it is moved along
LOWEST = -1e4  # a logprob; times a probability of 0 it is 0, which -inf is not
# By lens, then by (layer, device): on the CPU a tensor is the numbers of the lens themselves.
_tensors: WeakKeyDictionary[LensMaps, dict[tuple[int, str], tuple[Tensor, Tensor | None]]] = (
    WeakKeyDictionary()
)


def mapped(lens: LensMaps | None, layer: int, rows: Tensor) -> Tensor:
    """Streams (N, C) after a layer as the lens has them; themselves where it has no such layer."""
    if lens is None or layer not in lens.layers:
        return rows
    own = _tensors.setdefault(lens, {})
    key = layer, str(rows.device)
    if key not in own:
        place = lens.layers.index(layer)
        bias = None if lens.biases is None else torch.from_numpy(lens.biases[place])
        own[key] = (
            torch.from_numpy(lens.maps[place]).to(rows.device),
            None if bias is None else bias.to(rows.device),
        )
    matrix, bias = own[key]
    stream = rows.float()
    image = stream @ matrix.T
    if lens.kind == "tuned":
        image = stream + image
    if bias is not None:
        image = image + bias
    return image.to(rows.dtype)


def fit_lens(
    model: Any, way: Way, ids: list[int], lens: LensMaps, most: int
) -> Generator[None, None, LensFit]:
    """See ``base.Inspector``."""
    last = len(way.parts.layers) - 1
    step = max(len(ids) // most, 1)
    positions = list(range(len(ids) - 1, -1, -step))[:most]
    streams = yield from residuals_at(model, way, ids, [*lens.layers, last], positions)
    sums = torch.zeros(2, len(lens.layers))
    for first in range(0, len(positions), HEAD_ROWS):
        some = slice(first, first + HEAD_ROWS)
        own = _logprobs(model, way, streams[-1, some])
        for place, layer in enumerate(lens.layers):
            for row, via in enumerate((lens, None)):
                other = _logprobs(model, way, mapped(via, layer, streams[place, some]))
                sums[row, place] += float((own.exp() * (own - other)).sum())
            yield
    through, plain = (sums / len(positions)).tolist()
    return LensFit(layers=lens.layers, lens=tuple(through), plain=tuple(plain))


def _logprobs(model: Any, way: Way, rows: Tensor) -> Tensor:
    return (
        lens_logits(model, way.parts, rows)[:, : way.vocab_size].log_softmax(-1).clamp_min(LOWEST)
    )


def read_direction(
    model: Any, way: Way, ids: list[int], direction: Array, topk: int
) -> Generator[None, None, DirectionReading]:
    """See ``base.Inspector``."""
    step = max(len(ids) // MOST_STREAMS, 1)
    positions = list(range(len(ids) - 1, -1, -step))[:MOST_STREAMS]
    last = len(way.parts.layers) - 1
    streams = (yield from residuals_at(model, way, ids, [last], positions))[0]
    change = torch.from_numpy(direction).to(streams.device)
    size = SHARE * streams.float().norm(dim=-1, keepdim=True) / change.norm().clamp_min(1e-30)
    moved = (streams.float() + size * change).to(streams.dtype)
    logits = [lens_logits(model, way.parts, rows)[:, : way.vocab_size] for rows in (moved, streams)]
    yield
    mean = ((logits[0] - logits[1]) / size).mean(0)
    count = min(topk, len(mean))
    pairs = [
        [*zip(top.indices.tolist(), (sign * top.values).tolist(), strict=True)]
        for sign in (1, -1)
        for top in [(sign * mean).topk(count)]
    ]
    return DirectionReading(tuple(pairs[0]), tuple(pairs[1]))
