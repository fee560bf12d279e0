"""GET, POST and DELETE under /v1/models."""

from __future__ import annotations

from typing import Any

from flask import request

from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.request_context import Exchange
from transformers_api.api.http.services import Services, services
from transformers_api.api.openai.schemas.answers import Error
from transformers_api.api.openai.schemas.models import (
    Deleted,
    LoadAnswer,
    LoadRequest,
    ModelDetail,
    ModelList,
)
from transformers_api.errors import InvalidRequest, ModelNotFound, NotFound
from transformers_api.serving.models.spec import HubSource, ModelSpec
from transformers_api.serving.swap.residency import SwapperStatus

blueprint = Blueprint("models", __name__, description="What can be served, and what is in memory")


@blueprint.at("/v1/models")
@blueprint.gives(ModelList)
def list_models() -> Any:
    """List the models that may be asked for.

    Those of the registry, those in the local Hugging Face cache, and what is in memory.
    """
    known = services()
    status = known.swapper.status()
    specs = _servable(known, status)
    return {"object": "list", "data": [_shown(known, spec, status) for spec in specs]}


@blueprint.at("/v1/models/<path:model_id>")
@blueprint.gives(ModelDetail)
@blueprint.gives(Error, 404, description="No such model")
def retrieve_model(model_id: str) -> Any:
    """Describe one model."""
    known = services()
    spec = known.registry.resolve(model_id)
    shown = _shown(known, spec, known.swapper.status())
    return {**shown, "id": model_id, "metadata": _metadata(spec)}


@blueprint.at("/v1/models", methods=["POST"])
@blueprint.takes(LoadRequest, example={"model": "smollm2-135m-instruct"})
@blueprint.gives(LoadAnswer)
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 503, description="The model could not be loaded")
def load_model(body: dict[str, Any]) -> Any:
    """Load a model, in place of the one in memory.

    Answers once it is loaded, which may take minutes. Running answers are finished first.
    """
    known = services()
    model_id, device = body["model"], body.get("device", "auto")
    if device != "auto" and device not in known.devices():
        raise InvalidRequest(f"This machine has no device '{device}'", param="device")
    spec = known.registry.resolve(model_id)
    with Exchange(known, request.environ) as exchange:
        loaded = known.swapper.load(
            model_id,
            device=None if device == "auto" else device,
            cancellation=exchange.cancellation,
        )
    status = known.swapper.status()
    return {
        "id": model_id,
        "object": "model",
        "created": _created(known, spec),
        "owned_by": _owner(spec),
        "status": "loaded" if loaded else "already_loaded",
        "device": (status.device if status.model == spec.name else None) or device,
    }


@blueprint.at("/v1/models/<path:model_id>", methods=["DELETE"])
@blueprint.gives(Deleted)
@blueprint.gives(Error, 404, description="Not in memory")
def unload_model(model_id: str) -> Any:
    """Take a model out of memory, once its running answers are finished."""
    known = services()
    with Exchange(known, request.environ) as exchange:
        evicted = known.swapper.evict(model_id, cancellation=exchange.cancellation)
    if not evicted and not _unload_encoder(known, model_id):
        raise NotFound(f"Model '{model_id}' is not loaded", param="model")
    return {"id": model_id, "object": "model", "deleted": True}


def _servable(known: Services, status: SwapperStatus) -> list[ModelSpec]:
    """Registered entries, then what lies in the Hub's cache, then the resident; each once."""
    specs = {spec.name: spec for spec in known.registry.list()}
    repos = {spec.source.repo for spec in specs.values() if isinstance(spec.source, HubSource)}
    others = [repo for repo in known.store.cached_hub_repos() if repo not in repos]
    for model_id in [*others, *([status.model] if status.model else [])]:
        try:
            spec = known.registry.resolve(model_id)
        except ModelNotFound:  # cached, but not allowed
            continue
        specs.setdefault(spec.name, spec)
    return list(specs.values())


def _shown(known: Services, spec: ModelSpec, status: SwapperStatus) -> dict[str, Any]:
    shown = {
        "id": spec.name,
        "object": "model",
        "created": _created(known, spec),
        "owned_by": _owner(spec),
        "loaded": status.model == spec.name or _encoder(known) == spec.name,
        "permission": [],
        "root": spec.name,
        "parent": None,
    }
    if status.model == spec.name and status.max_model_len is not None:
        shown["max_model_len"] = status.max_model_len
        shown["quantization"] = status.quantization
    return shown


def _encoder(known: Services) -> str | None:
    return known.embeddings.encoder if known.embeddings else None


def _unload_encoder(known: Services, model_id: str) -> bool:
    is_there = _encoder(known) == known.registry.resolve(model_id).name
    return is_there and known.embeddings is not None and known.embeddings.give_back(0)


def _created(known: Services, spec: ModelSpec) -> int:
    """When its files came to this machine; of what is not here, when the server started."""
    folder = known.store.locate(spec)
    return known.created if folder is None else int(folder.stat().st_mtime)


def _owner(spec: ModelSpec) -> str:
    return "huggingface" if isinstance(spec.source, HubSource) else "local"


def _metadata(spec: ModelSpec) -> dict[str, Any]:
    source = spec.source
    facts = {
        "huggingface_repo": source.repo if isinstance(source, HubSource) else None,
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "default_device": spec.device,
        "max_context_tokens": spec.max_context_tokens,
        "is_instruct": spec.is_instruct,
    }
    return {**spec.metadata, **{key: fact for key, fact in facts.items() if fact is not None}}
