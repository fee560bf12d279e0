"""The edits of attention that the acting check makes: of what it reads, and of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from transformers_api.engine.runners.edited_attention import (
    Attending,
    AttentionEdit,
    AttentionInputs,
)
from transformers_api.inspection.attention import AttentionSource
from transformers_api.inspection.attention_edits import change_attention
from transformers_api.inspection.edit_plan import Edit
from transformers_api.inspection.editable import INPUTS, Part

Sizes = dict[Part, tuple[int, int]]  # heads, and numbers of each, of what attention reads
Place = tuple[int, int, int, int, int]  # see AttentionEdit, from ``start`` on


def checking(
    layer: int, parts: Sequence[Part], heads: int, place: Place, source: AttentionSource
) -> AttentionEdit | None:
    """A change of these parts of a layer that its logits show; None where none is attention's."""
    inputs = [part for part in parts if part in INPUTS]
    has_weights = "weights" in parts
    if not (inputs or has_weights):
        return None
    apply = partial(_attend, _of_weights(layer, heads), place[3]) if has_weights else None
    before = partial(_scale, inputs) if inputs else None
    return AttentionEdit(layer, *place, apply, source.place_of(layer), before)


def noting(layer: int, place: Place, sizes: dict[int, Sizes]) -> AttentionEdit:
    """No change; the sizes of what the layer reads are noted."""

    def note(inputs: AttentionInputs) -> None:
        sizes[layer] = {
            part: (inputs.of(part).shape[1], inputs.of(part).shape[2]) for part in INPUTS
        }

    return AttentionEdit(layer, *place, before=note)


def _of_weights(layer: int, heads: int) -> list[Edit]:
    """Nothing is read from the first token by the first half of the heads, more by the others."""
    half = max(heads // 2, 1)
    first, others = tuple(range(half)), tuple(range(half, heads))
    make: Callable[..., Edit] = partial(Edit, part="weights", layer=layer, positions=((0, None),))
    blocked = make(do="block", units=first, keys=((0, 1),))
    return [blocked, *([make(do="temper", units=others, by=0.1)] if others else [])]


def _attend(edits: Sequence[Edit], stop: int, call: Attending) -> None:
    _, count, keys = call.shape
    change_attention(edits, call, stop - count, stop - keys)


def _scale(parts: Sequence[Part], inputs: AttentionInputs) -> None:
    factors: dict[Any, float] = {"q": 30.0, "k": -2.0, "v": 0.5}
    for part in parts:
        rows: Tensor = inputs.of(part)
        rows *= factors[part]
