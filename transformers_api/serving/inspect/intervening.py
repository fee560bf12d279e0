"""A generation with interventions: the facts of the model that they need, and their plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers_api.config.settings import Settings
from transformers_api.errors import InspectionDisabled, ModelNotCapable, PromptTooLarge
from transformers_api.inspection.base import Array, TracePlan
from transformers_api.inspection.edit_plan import InterventionsDisabled
from transformers_api.inspection.editable import Part
from transformers_api.inspection.questions import Inspected, PartNumbers
from transformers_api.inspection.sae import FeaturePlan
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect import activation_plan, storing
from transformers_api.serving.inspect.calibration import Calibration
from transformers_api.serving.inspect.comparing import check_comparable, with_twins
from transformers_api.serving.inspect.edit_positions import PromptPlaces
from transformers_api.serving.inspect.edit_request import InterveneRequest, check_size
from transformers_api.serving.inspect.edit_vectors import Facts
from transformers_api.serving.inspect.interventions import (
    LIGHT_PLACES,
    PlannedEdits,
    forced_tokens,
    plan_edits,
)
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.inspect.run_file import Run
from transformers_api.serving.inspect.run_store import RunStore
from transformers_api.serving.inspect.stored_maps import lens_via, sae_for
from transformers_api.serving.inspect.tensor_store import StoredTensors
from transformers_api.serving.inspect.trace_plan import TraceRequest, check_more, probes_of
from transformers_api.serving.inspect.trace_slots import LIGHT, WHOLE
from transformers_api.serving.inspect.vector_store import Vector
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans edits, with what the server knows. ``vector``, ``run``: see ``Facts``."""

    settings: Settings
    inspections: Inspections
    cancellation: Cancellation
    vector: Callable[[str], Vector]
    lens: Callable[[str], StoredTensors]
    sae: Callable[[str], StoredTensors]
    calibration: Calibration
    runs: RunStore
    run: Callable[[str], Run]

    def planned_request(
        self, model: LoadedModel, request: GenerationRequest, *, whole: bool
    ) -> GenerationRequest:
        """``request`` with its edits and all that is noted; raises as the two below."""
        if request.intervene is not None:
            request = self.with_edits(model, request)
        if request.stores or request.trace is not None:
            request = self.with_notes(model, request, whole=whole)
        return request

    def with_edits(self, model: LoadedModel, request: GenerationRequest) -> GenerationRequest:
        """``request`` with the edits of each prompt; raises as ``planned``."""
        assert request.intervene is not None
        engine = model.engine
        prompts = []
        for ids in request.prompts:
            most = len(ids) + request.params.max_tokens
            may_slide = engine.context_overflow is not None and most > engine.max_model_len
            prompts.append(
                PromptPlaces(
                    ids=ids,
                    most=most,
                    vocabulary=model.vocabulary,
                    spans=request.spans,
                    window=engine.max_model_len if may_slide else None,
                )
            )
        params = request.params
        if request.intervene.compares:
            check_comparable(request, engine.max_model_len, prompts)
        intervene = request.intervene
        if intervene.has_twins:
            request = with_twins(request)  # which are not forced to say what the others are
        forced = forced_tokens(intervene, engine.vocab_size, params.max_tokens)
        edits = self.planned(model, intervene, prompts)
        params = replace(params, forced={**forced, **params.forced})
        return replace(request, edits=edits, params=params)

    def with_notes(
        self, model: LoadedModel, request: GenerationRequest, *, whole: bool
    ) -> GenerationRequest:
        """``request`` with all that is noted while it is answered.

        Vectors that its trace measures along, activations, what a run keeps. Raises as
        ``probes_of``, ``activation_plan.planned`` and ``RunStore.check``.
        """
        if request.stores:
            request = storing.started(request)
        trace, options = request.trace, request.trace_options
        if trace is None or options is None:
            return request
        inspector = model.inspector
        assert inspector is not None
        trace = self._with_stored(model, trace, options)
        if trace.parts is not None:
            self.inspections.check_parts(
                model, inspector, trace.parts, request.prompts[0], self.cancellation
            )
        activations = activation_plan.planned(
            options.activations,
            inspector.anatomy,
            lambda: self.inspections.editable(model, inspector, self.cancellation),
            stores=request.run is not None,
        )
        choices, most = len(request.prompts) * request.per_prompt, request.params.max_tokens
        if activations.specs:
            more = activations.token_bytes * choices
            check_more(trace, more, most, self.settings, whole=whole)
        trace = replace(trace, activations=activations.specs, records=activations.records)
        request = replace(request, trace=trace)
        if request.run is not None:
            storing.check(self.runs, model, request, activations)
        return request

    def _with_stored(
        self, model: LoadedModel, trace: TracePlan, options: TraceRequest
    ) -> TracePlan:
        """``trace`` with the vectors, the lens and the autoencoder that ``options`` name."""
        assert model.inspector is not None
        anatomy, features = model.inspector.anatomy, None
        if options.features is not None:
            name = options.features.sae
            sae = sae_for(model, anatomy, name, self.sae(name), "trace.features.sae")
            if sae.part != "resid":
                raise ModelNotCapable(
                    f"sae '{name}' is of part {sae.part}: only features of resid can be traced",
                    param="trace.features",
                )
            features = FeaturePlan(sae, options.features.topk)
        via = None if options.lens is None else options.lens.via
        return replace(
            trace,
            probes=probes_of(options.probes, self.vector, anatomy),
            lens_via=lens_via(model, anatomy, via, self.lens, "trace.lens.via"),
            features=features,
        )

    def planned(
        self, model: LoadedModel, intervene: InterveneRequest, prompts: Sequence[PromptPlaces]
    ) -> tuple[PlannedEdits, ...]:
        """The edits of each prompt.

        Raises InterventionsDisabled, InspectionDisabled, ModelNotCapable, and what ``plan_edits``
        does.
        """
        inspector = checked(model, intervene, self.settings)
        inspections, cancellation = self.inspections, self.cancellation

        def encoded(text: str) -> Sequence[int]:
            chat_template.check_bytes(text, self.settings.inspected_prompt_bytes)
            ids = chat_template.encode_text(model, text)[: model.engine.max_model_len - 1]
            if len(ids) > (most := self.settings.inspect_max_tokens):
                raise PromptTooLarge(f"Prompt too large to inspect: {len(ids)} tokens (max {most})")
            return ids

        def numbers(text: str | None, places: Sequence[tuple[int, Part]]) -> Sequence[Array]:
            if text is None:
                return self.calibration.numbers(
                    model, places, lambda question: inspections.ask(model, question, cancellation)
                )
            question = PartNumbers(encoded(text), places)
            return inspections.ask(model, question, cancellation)

        def prompt(text: str) -> PromptPlaces:
            ids = encoded(text)
            return PromptPlaces(ids=ids, most=len(ids), vocabulary=model.vocabulary, spans=tuple)

        facts = Facts(
            editable=inspections.editable(model, inspector, cancellation),
            norms=lambda: inspections.stream_norms(
                model, inspector, cancellation, self.calibration
            ),
            numbers=numbers,
            vector=self.vector,
            sae=lambda name, param: sae_for(model, inspector.anatomy, name, self.sae(name), param),
            prompt=prompt,
            run=self.run,
        )
        if not facts.editable.places:
            raise ModelNotCapable(
                f"model type {inspector.anatomy.model_type} shows no residual stream that could "
                "be changed",
                param=intervene.name,
            )
        return plan_edits(model, intervene, facts, prompts)


def checked(model: LoadedModel, intervene: InterveneRequest, settings: Settings) -> Inspected:
    """The inspector of a model that may be changed. Raises as ``planned``."""
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
    if request.trace is not None and not request.edited_places:
        return request.trace_cost
    edited = LIGHT if request.edited_places <= LIGHT_PLACES else WHOLE
    return edited if request.trace is None else max(edited, request.trace_cost)
