"""Interventions in an answer: from the fields of a request to the edits of each sequence.

Everything that can be wrong is found here, before the first byte; what would change nothing is
left out, so that "off" is off to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers_api.inspection.edit_plan import Edit, EditPlan
from transformers_api.serving.inspect.edit_positions import PromptPlaces
from transformers_api.serving.inspect.edit_request import (
    EditRequest,
    ForceRequest,
    InterveneRequest,
    check_size,
)
from transformers_api.serving.inspect.edit_vectors import Facts, refusal
from transformers_api.serving.inspect.model_edit import ModelEdit
from transformers_api.serving.swap.loaded_model import LoadedModel

MOST_PLACES = 256  # of all edits, in one step
LIGHT_PLACES = 8  # more count as a whole trace does


@dataclass(frozen=True, slots=True)
class PlannedEdits:
    """The edits of a sequence, None where nothing is changed, and what they are in words."""

    plan: EditPlan | None
    described: tuple[Mapping[str, Any], ...]


def plan_edits(
    model: LoadedModel,
    request: InterveneRequest,
    facts: Facts,
    prompts: Sequence[PromptPlaces],
) -> tuple[PlannedEdits, ...]:
    """The edits of each prompt's sequences.

    Raises InvalidRequest and ModelNotCapable, with the field; NotFound for a vector.
    """
    check_size(request)
    edits = [
        ModelEdit(model, facts, each, f"{request.name}.edits[{i}]")
        if isinstance(each, EditRequest)
        else each
        for i, each in enumerate(request.edits)
    ]
    places = sum(len(edit.layers) for edit in edits if isinstance(edit, ModelEdit))
    if places > MOST_PLACES:
        raise refusal(
            f"{request.name} edits {places} places per step (max {MOST_PLACES})", request.name
        )
    return tuple(_planned(edits, prompt) for prompt in prompts)


def _planned(edits: Sequence[ModelEdit | ForceRequest], prompt: PromptPlaces) -> PlannedEdits:
    made: list[Edit] = []
    described: list[dict[str, Any]] = []
    for edit in edits:
        if isinstance(edit, ForceRequest):
            tokens = {"step": edit.step, "token_ids": list(edit.token_ids)}
            described.append({"do": "force", **tokens, "elided": False})
            continue
        own, words = edit.of(prompt)
        made += own
        described.append(words)
    if not made:
        return PlannedEdits(None, tuple(described))
    plan = EditPlan(edits=tuple(made), identity=_identity(made))
    return PlannedEdits(plan, tuple(described))


def forced_tokens(request: InterveneRequest, vocab_size: int, max_tokens: int) -> dict[int, int]:
    """The output tokens that are forced, by step. Raises InvalidRequest."""
    forced: dict[int, int] = {}
    for number, each in enumerate(request.edits):
        if not isinstance(each, ForceRequest):
            continue
        name = f"{request.name}.edits[{number}]"
        if each.step + len(each.token_ids) > max_tokens:
            raise refusal(
                f"{name}.step and token_ids go beyond the {max_tokens} tokens that may be written",
                f"{name}.step",
            )
        if max(each.token_ids) >= vocab_size:
            raise refusal(f"{name}.token_ids must be below {vocab_size}", f"{name}.token_ids")
        forced |= {each.step + at: token for at, token in enumerate(each.token_ids)}
    return forced


def _identity(edits: Sequence[Edit]) -> str:
    digest = hashlib.sha256()
    for edit in edits:
        numbers = (edit.units, edit.by, edit.is_aligned, edit.keeps_norm, edit.keys)
        if edit.feature is not None:
            feature = edit.feature
            digest.update(repr((feature.sae.digest, feature.number, feature.value)).encode())
        digest.update(repr((edit.do, edit.part, edit.layer, edit.positions, numbers)).encode())
        if edit.vector is not None:
            digest.update(repr(edit.vector.shape).encode() + edit.vector.tobytes())
    return digest.hexdigest()
