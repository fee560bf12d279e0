"""An answer that is kept as a run: what is fixed for it before it begins."""

from __future__ import annotations

import secrets
from dataclasses import replace

from transformers_api.errors import InvalidRequest
from transformers_api.inspection.base import TracePlan
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect.activation_plan import PlannedActivations
from transformers_api.serving.inspect.run_store import RunStore, new_id
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.inspect.trace_slots import LIGHT
from transformers_api.serving.swap.loaded_model import LoadedModel

_SEEDS = 2**63
_STEP = 1000  # bytes of a token's trace in the file, beside what grows
_NUMBER = 4  # bytes
_LIKELY = 5  # tokens that are noted where nobody asked for a trace


def started(request: GenerationRequest) -> GenerationRequest:
    """``request`` under the id of its run, with a seed and a trace. Raises InvalidRequest."""
    if request.per_prompt > request.n:
        raise InvalidRequest("store cannot go with best_of above n", param="best_of")
    if request.trace is None:
        request = replace(
            request,
            trace=TracePlan(topk=_LIKELY),
            trace_options=TraceRequest(topk=_LIKELY),
            trace_cost=LIGHT,
        )
    if request.params.seed is None:
        params = replace(request.params, seed=secrets.randbelow(_SEEDS))
        request = replace(request, params=params)
    return replace(request, run=new_id())


def check(
    store: RunStore, model: LoadedModel, request: GenerationRequest, activations: PlannedActivations
) -> None:
    """Raise InvalidRequest or PayloadTooLarge for a run that cannot be kept."""
    name = "trace" if request.trace_options and request.trace_options.store else "intervene"
    most, engine = request.params.max_tokens, model.engine
    longest = max(map(len, request.prompts))
    window = engine.max_model_len
    if activations.records and engine.context_overflow is not None and longest + most > window:
        raise InvalidRequest(
            "stored activations need prompt and answer within the model's window; use max_tokens "
            f"<= {window - longest}",
            param=f"{name}.store",
        )
    assert request.trace is not None
    per_token = request.trace.bytes + activations.token_bytes
    recorded = (longest + most) * activations.record_width * _NUMBER
    choices = len(request.prompts) * request.per_prompt
    store.check(choices * (recorded + most * (_STEP + per_token)), f"{name}.store")
