"""Edits of attention in a recorded pass: what it read, from its memory and from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.runners.edited_attention import AttentionCall, AttentionEdit
from transformers_api.kernels.graph.executor import FinishedCall
from transformers_api.kernels.modules.attention import numbers_of

Change = Callable[[FinishedCall], None]


def attention_changes(
    model: Any, edits: Sequence[AttentionEdit], positions: Tensor, cache: list[Tensor]
) -> dict[Any, Change]:
    """Changes of finished calls by ``hook_points.attention_key``.

    ``positions`` (N, 1): of the tokens of the pass. ``cache``: keys and values, layer by layer.
    """
    by_key: dict[Any, list[AttentionEdit]] = {}
    for edit in edits:
        key = edit.layer if edit.weights is None else model.get_submodule(edit.weights[0])
        by_key.setdefault(key, []).append(edit)
    return {key: partial(_change, own, positions, cache) for key, own in by_key.items()}


def _change(
    edits: Sequence[AttentionEdit], positions: Tensor, cache: list[Tensor], call: FinishedCall
) -> None:
    query, output = call.tensors  # (N, H, 1, D), (N, 1, H, D')
    assert call.cached is not None
    for edit in edits:
        tokens = slice(edit.start, edit.start + edit.count)
        own = positions[tokens, 0]
        length = int(own[-1]) + 1
        key, value = (
            numbers_of(cache[index][edit.slot, :, :length, :size])
            for index, size in zip(call.cached, (query.shape[3], output.shape[3]), strict=True)
        )
        masks, options = _masks(call, own, length)
        edit.apply(
            AttentionCall(
                query[tokens, :, 0].transpose(0, 1), key, value, masks, output[tokens, 0], options
            )
        )


def _masks(
    call: FinishedCall, positions: Tensor, length: int
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The masks (H | 1, R, S) of queries at ``positions`` (R,), and the function's options."""
    distance = positions[:, None] - torch.arange(length)
    visible = distance >= 0
    window = call.options["window"]
    if window > 0:
        visible &= distance < window
    elif window < 0:
        visible &= distance <= (positions % -window)[:, None]
    if not call.options.get("is_own"):
        return (visible[None],), call.options["options"]
    options = {"scaling": call.options["scaling"]}
    slopes = torch.tensor([*call.options["slopes"].values()])
    bias = () if not len(slopes) else (-slopes[:, None, None] * distance,)
    return (*bias, visible[None]), options
