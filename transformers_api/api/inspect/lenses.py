"""/inspect/lenses: maps of residual streams that make the logit lens read better, by name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import flask
from flask import request

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint, read_bytes
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import subjects
from transformers_api.api.inspect.schemas.stored import Forgotten, LensList, StoredLens
from transformers_api.api.inspect.vectors import check_name
from transformers_api.errors import InvalidRequest, ModelNotCapable
from transformers_api.inspection import questions
from transformers_api.inspection.lens_maps import LensFit, LensMaps
from transformers_api.inspection.questions import Inspected
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.lens_files import lens_of_file, tensors_of
from transformers_api.serving.inspect.stored_maps import check_lens
from transformers_api.serving.swap.loaded_model import LoadedModel

blueprint = Blueprint("lenses", __name__, dialect=NIELS, description="Lenses by name")

FIT_POSITIONS = 24  # of all texts: each layer is read twice through the head
MOST_KL = 0.05  # nats, in which a lens still fits, however well the head alone does
MISFIT = "after layer {} it reads worse than the head alone: {:.3g} nats from the model, not {:.3g}"
_FILE = {"type": "string", "format": "binary"}
_BODY = {"required": True, "content": {"application/octet-stream": {"schema": _FILE}}}


@blueprint.at("/inspect/lenses")
@blueprint.gives(LensList)
def list_lenses() -> Any:
    """List the lenses of this key."""
    inspect_auth.check_enabled()
    stored = services().lenses.of(flask.g.client)
    return {"object": "list", "data": [{"name": name, **meta} for name, meta in stored.items()]}


@blueprint.at("/inspect/lenses/<name>", methods=["PUT"])
@blueprint.documents(requestBody=_BODY)
@blueprint.gives(StoredLens)
@blueprint.gives(StoredLens, 201, description="There was none of this name")
@blueprint.gives(Failed, 413, description="Too many lenses, or too many bytes")
def put_lens(name: str) -> Any:
    """Keep a lens, once it was checked with a model: `?model=`, else the server's own.

    A file of torch, safetensors or numpy: a tuned lens with `N.weight` and `N.bias`, or a Jacobian
    lens with `J` and `source_layers`. Nothing is unpickled. `kl` says how far what it reads after
    each of its layers is from what the model says, over the calibration texts.
    """
    inspect_auth.check()
    check_name(name)
    lens = lens_of_file(upload(read_bytes(request)))
    with RequestContext(services()) as context:
        model = context.lease(request.args.get("model"))
        inspector = subjects.inspector_of(model)
        if not inspector.anatomy.lens:
            raise ModelNotCapable(
                f"model type {inspector.anatomy.model_type} has no logit lens", param="model"
            )
        check_lens(lens, inspector.anatomy, "the lens", "layers")
        fit = _fit(context, model, lens)
        meta = {
            "kind": lens.kind,
            "model": model.spec.name,
            "layers": list(lens.layers),
            "width": lens.width,
            "kl": [arrays.digits(value) for value in fit.lens],
            "kl_plain": [arrays.digits(value) for value in fit.plain],
            "note": _note(fit, inspector),
            "created": int(time.time()),
        }
        is_new = services().lenses.put(context.client, name, meta, tensors_of(lens))
        return _described(name), 201 if is_new else 200


def upload(data: bytes) -> bytes:
    """The bytes that were sent. Raises InvalidRequest where there are none."""
    if not data.strip():
        raise InvalidRequest("The body is empty; it must be a file")
    return data


def _fit(context: RequestContext, model: LoadedModel, lens: LensMaps) -> LensFit:
    """The fit over the calibration texts, by their tokens."""
    inspections = services().inspections
    texts = services().calibration.get(context.client).ids(model)[:FIT_POSITIONS]
    if not texts:
        raise InvalidRequest("the calibration texts have no tokens of this model")
    most = FIT_POSITIONS // len(texts)
    fits = [
        inspections.ask(model, questions.LensFit(ids, lens, most), context.cancellation)
        for ids in texts
    ]
    tokens = [min(len(ids), most) for ids in texts]
    return LensFit(
        layers=lens.layers,
        lens=_mean([fit.lens for fit in fits], tokens),
        plain=_mean([fit.plain for fit in fits], tokens),
    )


def _mean(rows: Sequence[Sequence[float]], weights: Sequence[int]) -> tuple[float, ...]:
    return tuple(
        sum(value * weight for value, weight in zip(column, weights, strict=True)) / sum(weights)
        for column in zip(*rows, strict=True)
    )


def _note(fit: LensFit, inspector: Inspected) -> str | None:
    """The reason to doubt, from the last of its layers: there a lens has the least to do."""
    own, plain = fit.lens[-1], fit.plain[-1]
    if own <= MOST_KL or own <= plain * 1.05:
        return None
    return MISFIT.format(fit.layers[-1], own, plain)


@blueprint.at("/inspect/lenses/<name>")
@blueprint.gives(StoredLens)
@blueprint.gives(Failed, 404, description="No lens of this name")
def get_lens(name: str) -> Any:
    """Show a lens without its numbers."""
    inspect_auth.check_enabled()
    return _described(name)


@blueprint.at("/inspect/lenses/<name>", methods=["DELETE"])
@blueprint.gives(Forgotten)
@blueprint.gives(Failed, 404, description="No lens of this name")
def delete_lens(name: str) -> Any:
    """Forget a lens."""
    inspect_auth.check_enabled()
    services().lenses.delete(flask.g.client, name)
    return {"name": name, "deleted": True}


def _described(name: str) -> Mapping[str, Any]:
    return {"name": name, **services().lenses.get(flask.g.client, name).meta}
