"""Edits of attention in a recorded pass: what it read, from its memory and from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.native.kv_cache import NativeCache
from transformers_api.engine.runners.edited_attention import (
    AttentionCall,
    AttentionEdit,
    AttentionInputs,
)
from transformers_api.kernels.graph.executor import FinishedCall
from transformers_api.kernels.graph.hook_points import INPUTS
from transformers_api.kernels.modules.attention import numbers_of, write_cache

Change = Callable[[FinishedCall], None]


def attention_changes(
    model: Any, edits: Sequence[AttentionEdit], positions: Tensor, kv: NativeCache
) -> dict[Any, Change]:
    """Changes of finished calls by ``hook_points.attention_key``.

    ``positions`` (N, 1): of the tokens of the pass.
    """
    cache = kv.tensors
    by_key: dict[Any, list[AttentionEdit]] = {}
    before: dict[int, list[AttentionEdit]] = {}
    for edit in edits:
        if edit.apply is not None:
            key = edit.layer if edit.weights is None else model.get_submodule(edit.weights[0])
            by_key.setdefault(key, []).append(edit)
        if edit.before is not None:
            before.setdefault(edit.layer, []).append(edit)
    changes: dict[Any, Change] = {
        key: partial(_change, own, positions, cache) for key, own in by_key.items()
    }
    return changes | {
        (INPUTS, layer): partial(_change_inputs, own, positions, kv)
        for layer, own in before.items()
    }


def _change_inputs(
    edits: Sequence[AttentionEdit], positions: Tensor, kv: NativeCache, call: FinishedCall
) -> None:
    cache = kv.tensors
    (query,) = call.tensors  # (N, H, 1, D)
    assert call.cached is not None
    sizes = query.shape[3], call.options["value_size"]
    for edit in edits:
        tokens = slice(edit.start, edit.start + edit.count)
        stop = int(positions[edit.start + edit.count - 1, 0]) + 1
        rows = [  # those of int8 are codes: what is made of them is written back
            cache[index][edit.slot, :, stop - edit.count : stop, :size]
            for index, size in zip(call.cached, sizes, strict=True)
        ]
        states = [numbers_of(each) for each in rows]
        assert edit.before is not None
        own = AttentionInputs(query[tokens, :, 0], *(each.transpose(0, 1) for each in states))
        edit.before(own)
        for index, each in zip(call.cached, states, strict=True):
            if edit.writes and cache[index].dtype == torch.int8:
                start = torch.tensor([stop - edit.count])
                write_cache(kv.library, each[None], cache[index][edit.slot][None], start)


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
        multiplied = query[tokens, :, 0].transpose(0, 1).to(key.dtype)  # as the kernel rounds it
        masks, options = _masks(call, own, length)
        assert edit.apply is not None
        edit.apply(AttentionCall(multiplied, key, value, masks, output[tokens, 0], options))


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
