"""/inspect/saes: sparse autoencoders by name, and what their features stand for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import flask
from flask import request
from werkzeug.exceptions import RequestEntityTooLarge

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint, read_bytes
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import subjects
from transformers_api.api.inspect.lenses import upload
from transformers_api.api.inspect.schemas.stored import Forgotten, SaeFeature, SaeList, StoredSae
from transformers_api.api.inspect.vectors import check_name
from transformers_api.errors import InvalidRequest
from transformers_api.inspection import questions
from transformers_api.inspection.sae import Array, Sae, SaePart
from transformers_api.serving.inspect import arrays, sae_fit
from transformers_api.serving.inspect.queue import deadline
from transformers_api.serving.inspect.sae_files import SaeFile, sae_of, sae_of_files
from transformers_api.serving.inspect.stored_maps import check_sae, sae_for
from transformers_api.serving.inspect.tensor_store import StoredTensors
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint("saes", __name__, dialect=NIELS, description="Sparse autoencoders by name")

TOPK = 10  # tokens of a feature
_PARTS: Mapping[str, SaePart] = {"resid": "resid", "attn": "attn", "mlp": "mlp"}
_FILE = {"type": "string", "format": "binary"}
_FORM = {
    "type": "object",
    "properties": {"weights": _FILE, "cfg": _FILE},
    "required": ["weights"],
}
_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": _FILE},
        "multipart/form-data": {"schema": _FORM},
    },
}


@blueprint.at("/inspect/saes")
@blueprint.gives(SaeList)
def list_saes() -> Any:
    """List the sparse autoencoders of this key."""
    inspect_auth.check_enabled()
    stored = services().saes.of(flask.g.client)
    return {"object": "list", "data": [{"name": name, **meta} for name, meta in stored.items()]}


@blueprint.at("/inspect/saes/<name>", methods=["PUT"])
@blueprint.documents(requestBody=_BODY)
@blueprint.gives(StoredSae)
@blueprint.gives(StoredSae, 201, description="There was none of this name")
@blueprint.gives(Failed, 413, description="Too many autoencoders, or too many bytes")
def put_sae(name: str) -> Any:
    """Keep a sparse autoencoder, once it was tried on a model: `?model=`, else the server's own.

    The weights are the body (safetensors or numpy's archive: `W_enc`, `W_dec`, `b_enc`, `b_dec`,
    and what its architecture needs), with `?part=` and `?layer=`; or a form has them as `weights`,
    and SAELens' `cfg.json` as `cfg`. `explained_variance` and `l0` are over the calibration texts.
    """
    inspect_auth.check()
    check_name(name)
    file = _sent()
    with RequestContext(services()) as context:
        model = context.lease(request.args.get("model"))
        anatomy = subjects.inspector_of(model).anatomy
        part, layer = file.place
        check_sae(file.meta["width"], part, layer, anatomy, "the autoencoder", "layer")
        meta = {**file.meta, "model": model.spec.name, "created": int(time.time())}
        sae = sae_of(name, StoredTensors(meta, file.tensors, ""))
        texts = _rows(context, model, sae)
        check = deadline(services().settings.inspect_timeout_s, context.cancellation)
        fit = sae_fit.fit(sae, sae_fit.counted(texts), check)
        meta |= {
            "explained_variance": arrays.digits(fit.explained),
            "l0": arrays.digits(fit.l0),
            "dead": arrays.digits(fit.dead),
            "tokens": fit.tokens,
            "note": fit.note,
        }
        is_new = services().saes.put(context.client, name, meta, file.tensors)
        return _described(name), 201 if is_new else 200


def _sent() -> SaeFile:
    """The autoencoder of this request. Raises InvalidRequest."""
    cfg: bytes | None = None
    if (request.mimetype or "") == "multipart/form-data":
        weights, cfg = _form()
    else:
        weights = read_bytes(request)
    names = request.args
    place = None
    if "layer" in names or "part" in names:
        part = _PARTS.get(names.get("part", "resid"))
        if part is None:
            raise InvalidRequest(f"part must be one of: {', '.join(_PARTS)}", param="part")
        place = part, _whole("layer", -1)
    k = _whole("k", 1) if "k" in names else None
    return sae_of_files(upload(weights), cfg, place, names.get("architecture"), k)


def _form() -> tuple[bytes, bytes | None]:
    """(weights, cfg) of a form. Raises InvalidRequest."""
    size = request.content_length
    try:
        files = request.files
    except RequestEntityTooLarge:
        if size is None or size > (request.max_content_length or size):
            raise
        raise InvalidRequest(
            "the form has too many parts, or one of them is large and no file", param="weights"
        ) from None
    others = sorted(set(files) - {"weights", "cfg"})
    if others or "weights" not in files:
        raise InvalidRequest(
            "the form must have a file weights, and may have a file cfg"
            + (f"; it has {', '.join(others)}" if others else ""),
            param="weights",
        )
    return files["weights"].read(), files["cfg"].read() if "cfg" in files else None


def _whole(name: str, least: int) -> int:
    try:
        value = int(request.args.get(name, ""))
    except ValueError:
        value = least - 1
    if not least <= value < 1 << 31:
        raise InvalidRequest(f"{name} must be a whole number from {least}", param=name)
    return value


def _rows(context: RequestContext, model: LoadedModel, sae: Sae) -> list[Array]:
    """The rows (n, C) that it is of, of each calibration text."""
    inspections = services().inspections
    texts = services().calibration.get(context.client).ids(model)
    if not texts:
        raise InvalidRequest("the calibration texts have no tokens of this model")
    place = [(sae.layer, sae.part)]
    numbers = (questions.PartNumbers(ids, place) for ids in texts)
    return [inspections.ask(model, each, context.cancellation)[0] for each in numbers]


@blueprint.at("/inspect/saes/<name>")
@blueprint.gives(StoredSae)
@blueprint.gives(Failed, 404, description="No autoencoder of this name")
def get_sae(name: str) -> Any:
    """Show a sparse autoencoder without its numbers."""
    inspect_auth.check_enabled()
    return _described(name)


@blueprint.at("/inspect/saes/<name>", methods=["DELETE"])
@blueprint.gives(Forgotten)
@blueprint.gives(Failed, 404, description="No autoencoder of this name")
def delete_sae(name: str) -> Any:
    """Forget a sparse autoencoder."""
    inspect_auth.check_enabled()
    services().saes.delete(flask.g.client, name)
    return {"name": name, "deleted": True}


@blueprint.at("/inspect/saes/<name>/features/<int:feature>")
@blueprint.gives(SaeFeature)
@blueprint.gives(Failed, 404, description="No autoencoder of this name")
def get_feature(name: str, feature: int) -> Any:
    """Show what a feature stands for: where it is strongest, and what it makes likelier.

    Over the calibration texts; `raised` and `lowered` move the last stream of some of their tokens
    along its direction, and read it through the model's own norm and head.
    """
    inspect_auth.check()
    stored = services().saes.get(flask.g.client, name)
    with RequestContext(services()) as context:
        model = context.lease(request.args.get("model") or stored.meta["model"])
        anatomy = subjects.inspector_of(model).anatomy
        sae = sae_for(model, anatomy, name, stored, "sae")
        if feature >= sae.features:
            raise InvalidRequest(f"feature must be in [0, {sae.features - 1}]", param="feature")
        rows = _rows(context, model, sae)
        values = sae_fit.values_of(sae, rows, feature)
        own = sae_fit.counted([each[:, None] for each in values])
        answer = {
            "sae": name,
            "id": feature,
            "density": arrays.digits(float((own > 0).mean())),
            "largest": arrays.digits(float(own.max())),
            "windows": _windows(context, model, values),
            "nearest": [
                {"id": other, "cosine": arrays.digits(cosine)}
                for other, cosine in sae_fit.nearest(sae, feature)
            ],
        }
        if anatomy.lens:
            answer |= _tokens(context, model, sae.decoder[feature])
        return answer


def _windows(
    context: RequestContext, model: LoadedModel, values: Sequence[Array]
) -> list[dict[str, Any]]:
    texts = services().calibration.get(context.client).ids(model)
    vocabulary = Vocabulary(model.tokenizer)
    return [
        {
            "text": window.text,
            "position": window.place,
            "tokens": [
                vocabulary.decoded(token)
                for token in texts[window.text][window.start :][: len(window.values)]
            ],
            "values": [arrays.digits(value) for value in window.values],
        }
        for window in sae_fit.windows(values)
    ]


def _tokens(context: RequestContext, model: LoadedModel, direction: Array) -> dict[str, Any]:
    ids = services().calibration.get(context.client).ids(model)[0]
    question = questions.DirectionReading(ids, direction, TOPK)
    reading = services().inspections.ask(model, question, context.cancellation)
    vocabulary = Vocabulary(model.tokenizer)

    def named(pairs: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        return [
            {"token_id": token, "token": vocabulary.decoded(token), "logit": arrays.digits(change)}
            for token, change in pairs
        ]

    return {"raised": named(reading.raised), "lowered": named(reading.lowered)}


def _described(name: str) -> Mapping[str, Any]:
    return {"name": name, **services().saes.get(flask.g.client, name).meta}
