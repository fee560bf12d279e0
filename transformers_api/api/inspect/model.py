"""GET /inspect/model: what can be asked of a model, and all limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import request

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import format as inspect_format
from transformers_api.api.inspect import subjects, views
from transformers_api.api.inspect.schemas.model import InspectedModel
from transformers_api.config.settings import Settings
from transformers_api.errors import InvalidRequest

blueprint = Blueprint("inspected_model", __name__, dialect=NIELS, description="What can be asked")


@blueprint.at("/inspect/model")
@blueprint.gives(InspectedModel)
@blueprint.gives(Failed, 403, description="`INSPECT_ENABLED` is off")
def inspect_model() -> Any:
    """Say what can be asked of a model: `?model=`, else the one in memory, else the default.

    With `?load=false` one that is not in memory is not loaded, and `loaded` is false.
    """
    inspect_auth.check_enabled()
    swapper, inspections, settings = (
        services().swapper,
        services().inspections,
        services().settings,
    )
    limits = _limits(settings)
    model_id = request.args.get("model") or swapper.status().model
    if not _may_load():
        name = services().registry.resolve(model_id or settings.default_model).name
        if not swapper.status().holds(name):
            return inspect_format.not_loaded(name, limits)
    inspect_auth.check_started()
    with RequestContext(services()) as context:
        model = context.lease(model_id)
        inspector = subjects.inspector_of(model)
        gradients = inspections.has_gradients(model, inspector, context.cancellation)
        layer = inspections.suggested_layer(model, inspector, context.cancellation)
        editable = inspections.editable(model, inspector, context.cancellation)
        norms: Sequence[float] = ()
        if editable.places:
            norms = inspections.stream_norms(
                model, inspector, context.cancellation, services().calibration.get(context.client)
            )
        return inspect_format.capabilities(
            model, inspector.anatomy, gradients, layer, editable, norms, limits
        )


def _may_load() -> bool:
    """The word of `?load=`. Raises InvalidRequest."""
    words = {"true": True, "1": True, "false": False, "0": False}
    word = request.args.get("load", "true").lower()
    if word not in words:
        raise InvalidRequest("load must be true or false", param="load")
    return words[word]


def _limits(settings: Settings) -> dict[str, Any]:
    return {
        "prompt_bytes": settings.inspected_prompt_bytes,
        "max_tokens": settings.inspect_max_tokens,
        "max_json_cells": settings.inspect_max_json_cells,
        "max_cells": settings.inspect_max_cells,
        "timeout_s": settings.inspect_timeout_s,
        "queue": settings.inspect_queue,
        "attribution_max_tokens": settings.attribution_max_tokens,
        "attribution_max_steps": views.MOST_STEPS,
        "lens_max_cells": views.MOST_LENS_CELLS,
        "hidden_states_max_json_numbers": views.MOST_JSON_STATES,
        "trace_max_bytes_per_token": settings.trace_max_bytes_per_token,
        "trace_max_layers": settings.trace_max_layers,
        "trace_max_requests": settings.trace_max_requests,
        "rate_limit_per_min": settings.rate_limit_per_min,
        "rate_limit_burst": settings.rate_limit_burst,
    }
