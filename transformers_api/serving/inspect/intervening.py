"""A generation with interventions: the facts of the model that they need, and their plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers_api.config.settings import Settings
from transformers_api.errors import InspectionDisabled, ModelNotCapable
from transformers_api.inspection.base import Array, Part
from transformers_api.inspection.edit_plan import InterventionsDisabled
from transformers_api.inspection.questions import Inspected, PartNumbers
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect.edit_positions import PromptPlaces
from transformers_api.serving.inspect.interventions import (
    LIGHT_PLACES,
    Facts,
    InterveneRequest,
    PlannedEdits,
    check_size,
    no_vector,
    plan_edits,
)
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.inspect.stream_norms import TEXT
from transformers_api.serving.inspect.trace_slots import LIGHT, WHOLE
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template


def with_edits(
    model: LoadedModel,
    request: GenerationRequest,
    settings: Settings,
    inspections: Inspections,
    cancellation: Cancellation,
) -> GenerationRequest:
    """``request`` with the edits of each prompt.

    Raises InterventionsDisabled, InspectionDisabled, ModelNotCapable, and what ``plan_edits`` does.
    """
    intervene = request.intervene
    assert intervene is not None
    engine = model.engine
    window = engine.max_model_len
    prompts = []
    for ids in request.prompts:
        most = len(ids) + request.params.max_tokens
        may_slide = engine.context_overflow is not None and most > window
        prompts.append(
            PromptPlaces(
                ids=ids,
                most=most,
                vocabulary=model.vocabulary,
                spans=request.spans,
                window=window if may_slide else None,
            )
        )
    edits = planned(model, intervene, settings, inspections, cancellation, prompts)
    return replace(request, edits=edits)


def planned(
    model: LoadedModel,
    intervene: InterveneRequest,
    settings: Settings,
    inspections: Inspections,
    cancellation: Cancellation,
    prompts: Sequence[PromptPlaces],
) -> tuple[PlannedEdits, ...]:
    """The edits of each prompt; raises as ``with_edits``."""
    inspector = checked(model, intervene, settings)

    def numbers(text: str | None, places: Sequence[tuple[int, Part]]) -> Sequence[Array]:
        ids = chat_template.encode_text(model, TEXT if text is None else text)
        ids = ids[: model.engine.max_model_len]
        return inspections.ask(model, PartNumbers(ids, places), cancellation)

    facts = Facts(
        editable=inspections.editable(model, inspector, cancellation),
        norms=lambda: inspections.stream_norms(model, inspector, cancellation),
        numbers=numbers,
        vector=_vector,
    )
    if not facts.editable.places:
        raise ModelNotCapable(
            f"model type {inspector.anatomy.model_type} shows no residual stream that could be "
            "changed",
            param=intervene.name,
        )
    return plan_edits(model, intervene, facts, prompts)


def checked(model: LoadedModel, intervene: InterveneRequest, settings: Settings) -> Inspected:
    """The inspector of a model that may be changed. Raises as ``with_edits``."""
    if not settings.intervene_enabled:
        raise InterventionsDisabled()
    if model.inspector is None:
        if not settings.inspect_enabled:
            raise InspectionDisabled()
        raise ModelNotCapable(
            f"Model '{model.spec.name}' cannot be inspected", param=intervene.name
        )
    check_size(intervene)
    return model.inspector


def place_cost(request: GenerationRequest) -> int:
    """The eighths of a place among those that are traced: see ``trace_plan.cost``."""
    if request.trace is not None:
        return request.trace_cost
    return LIGHT if request.edited_places <= LIGHT_PLACES else WHOLE


def _vector(name: str) -> Array:
    raise no_vector(name)
