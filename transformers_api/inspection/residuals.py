"""The residual stream: predictions of a prompt, the logit lens, the stream itself."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from transformers_api.inspection.base import Array, Ids, PromptReading
from transformers_api.inspection.lens_maps import LensMaps, LensTable
from transformers_api.inspection.lenses import mapped
from transformers_api.inspection.parts import lens_logits
from transformers_api.inspection.reading import (
    HEAD_ROWS,
    Way,
    each_logits,
    residuals_at,
)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Distributions of R positions and what they say of one token each."""

    top_ids: Tensor  # (R, k)
    top_logprobs: Tensor
    entropy: Tensor  # (R,)
    logprob: Tensor  # of the token
    rank: Tensor


def _rows(logits: Tensor, targets: Tensor, topk: int) -> _Rows:
    """``logits`` (R, V) float32, ``targets`` (R,)."""
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(topk, logits.shape[1]), dim=-1)
    own = targets[:, None]
    return _Rows(
        top_ids=top.indices,
        top_logprobs=top.values,
        entropy=torch.special.entr(logprobs.exp()).sum(-1),
        logprob=logprobs.gather(1, own)[:, 0],
        rank=(logits > logits.gather(1, own)).sum(-1),
    )


def read_prompt(
    model: Any, way: Way, ids: list[int], topk: int
) -> Generator[None, None, PromptReading]:
    """See ``base.Inspector``."""
    following = torch.tensor(ids[1:], device=model.device)  # what each token should have foreseen
    distributions: list[_Rows] = []

    def take(start: int, logits: Tensor) -> None:
        targets = following[start : start + len(logits)]
        distributions.append(_rows(logits[: len(targets)], targets, topk))

    yield from each_logits(model, way, ids, take)
    return PromptReading(
        surprisal=-_floats([rows.logprob for rows in distributions]),
        entropy=_floats([rows.entropy for rows in distributions]),
        rank=_ids([rows.rank for rows in distributions]),
        top_ids=_ids([rows.top_ids for rows in distributions]),
        top_logprobs=_floats([rows.top_logprobs for rows in distributions]),
    )


def read_lens(
    model: Any,
    way: Way,
    ids: list[int],
    layers: list[int],
    positions: list[int],
    topk: int,
    target: int | None,
    via: LensMaps | None = None,
) -> Generator[None, None, LensTable]:
    """See ``base.Inspector``."""
    count, last = len(positions), len(way.parts.layers) - 1
    streams = yield from residuals_at(model, way, ids, [*layers, last], positions)
    if target is None:
        targets = torch.cat((yield from _choices(model, way, streams[-1])))
    else:
        targets = torch.full((count,), target, device=streams.device)
    read = [mapped(via, layer, rows) for layer, rows in zip(layers, streams, strict=False)]
    flat = torch.stack(read, 1).flatten(0, 1)  # (P * L', C)
    repeated = targets.repeat_interleave(len(layers))
    distributions: list[_Rows] = []
    for rows, own in zip(
        torch.split(flat, HEAD_ROWS), torch.split(repeated, HEAD_ROWS), strict=True
    ):
        distributions.append(_rows(_lens(model, way, rows), own, topk))
        yield

    shape = (count, len(layers))
    return LensTable(
        top_ids=_ids([rows.top_ids for rows in distributions]).reshape(*shape, -1),
        top_probs=numpy.exp(_floats([rows.top_logprobs for rows in distributions])).reshape(
            *shape, -1
        ),
        entropy=_floats([rows.entropy for rows in distributions]).reshape(shape),
        target_ids=_ids([targets]),
        target_rank=_ids([rows.rank for rows in distributions]).reshape(shape),
        target_prob=numpy.exp(_floats([rows.logprob for rows in distributions])).reshape(shape),
    )


def _choices(model: Any, way: Way, stream: Tensor) -> Generator[None, None, list[Tensor]]:
    """The model's likeliest token after each residual (P, C) of the last layer."""
    chosen = []
    for rows in torch.split(stream, HEAD_ROWS):
        chosen.append(_lens(model, way, rows).argmax(-1))
        yield
    return chosen


def _lens(model: Any, way: Way, rows: Tensor) -> Tensor:
    return lens_logits(model, way.parts, rows)[:, : way.vocab_size]


def read_hidden_states(
    model: Any, way: Way, ids: list[int], layers: list[int], positions: list[int]
) -> Generator[None, None, Array]:
    """See ``base.Inspector``."""
    streams = yield from residuals_at(model, way, ids, layers, positions)
    return _floats([streams])


def _floats(parts: list[Tensor]) -> Array:
    return torch.cat(parts).float().cpu().numpy()


def _ids(parts: list[Tensor]) -> Ids:
    return torch.cat(parts).long().cpu().numpy()
