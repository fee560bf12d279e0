"""Shares of heads in a logit, each by the token that was read; on the engine thread."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_api.errors import AttentionUnavailable, ModelNotCapable
from transformers_api.inspection.attention import Attended, AttentionSource, Weights
from transformers_api.inspection.attention_edits import edited_rows
from transformers_api.inspection.base import AttentionMode
from transformers_api.inspection.logit_share import LogitShare
from transformers_api.inspection.reading import Way, last_logits

NOT_SUMMED = 0.05  # of the sizes of a head's shares: they are not what the head adds


def by_source(
    model: Any,
    way: Way,
    source: AttentionSource,
    ids: list[int],
    readers: dict[int, Tensor],
    shares: Sequence[LogitShare],
) -> Generator[None, None, list[LogitShare]]:
    """Shares of heads, each by the token that was read: weight * value @ direction.

    ``readers``: the directions (H, D) of each layer's heads.
    """
    if source.mode is not AttentionMode.TAP:
        raise AttentionUnavailable(
            "the values that heads read cannot be shown for this model", param="by"
        )
    split_shares: dict[int, Tensor] = {}  # (H, S) by layer
    starts: dict[int, int] = {}

    def take(layer: int, weights: Weights) -> None:
        if layer not in readers or not isinstance(weights, Attended):
            return
        last = weights.query.shape[2] - 1
        rows, sinks = weights.rows(0, slice(last, last + 1))
        first = len(ids) - rows.shape[-1]
        if way.edits is not None:
            plan, query = way.edits.edits, len(ids) - 1
            rows, _ = edited_rows(plan, layer, weights, (rows, sinks), None, query, first)
        probs = rows[:, 0].double()
        values = weights.numbers(weights.value[0]).double()
        values = values.repeat_interleave(weights.heads // len(values), dim=0)
        along = torch.einsum("hsd,hd->hs", values, readers[layer])
        split_shares[layer] = probs * along[:, -probs.shape[1] :]
        starts[layer] = first

    yield from last_logits(model, way, ids, lambda *_: source.watched(model, take, set(readers)))
    result: list[LogitShare] = [share for share in shares if share.part != "head"]
    for share in (share for share in shares if share.part == "head"):
        own = split_shares.get(share.layer)
        if own is None:
            result.append(share)
            continue
        values = own[share.index]
        size = max(float(values.abs().sum()), abs(share.value))
        if abs(float(values.sum()) - share.value) > NOT_SUMMED * max(size, 1e-6):
            raise ModelNotCapable(
                f"what head {share.index} of layer {share.layer} reads does not add up to what it "
                "gives: it is changed on the way",
                param="by",
            )
        result += [
            LogitShare("source", share.layer, value, share.index, starts[share.layer] + place)
            for place, value in enumerate(values.tolist())
        ]
    return result
