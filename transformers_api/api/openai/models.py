"""GET, POST and DELETE under /v1/models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flask import request

from transformers_api.api.http.auth import scope
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import RequestContext, upstream_refusal
from transformers_api.api.http.services import services
from transformers_api.api.openai.schemas.models import (
    Deleted,
    LoadAnswer,
    LoadRequest,
    ModelDetail,
    ModelList,
)
from transformers_api.errors import ApiError, InvalidRequest, ModelNotFound, NotFound
from transformers_api.serving.models.capabilities import (
    FileFacts,
    capabilities,
    context_length,
    read_facts,
)
from transformers_api.serving.models.spec import HubSource, ModelSpec
from transformers_api.serving.swap.loaded_model import under_entry
from transformers_api.serving.swap.residency import SwapperStatus
from transformers_api.serving.text.answer_facts import answer_facts, style_fields
from transformers_api.serving.text.model_text import ModelText

blueprint = Blueprint(
    "models",
    __name__,
    dialect=OPENAI,
    description="What can be served, and what is in memory",
)


@blueprint.at("/v1/models")
@blueprint.gives(ModelList)
def list_models() -> Any:
    """List the models that may be asked for.

    Those of the registry, those in the local Hugging Face cache, and what is in memory.
    """
    status = services().swapper.status()
    models = [_described(spec, status) for spec in _servable(status)]
    return {
        "object": "list",
        "data": models,
        "first_id": models[0]["id"] if models else None,
        "last_id": models[-1]["id"] if models else None,
        "has_more": False,
    }


@blueprint.at("/v1/models/<path:model_id>")
@blueprint.gives(ModelDetail)
@blueprint.gives(Error, 404, description="No such model")
def retrieve_model(model_id: str) -> Any:
    """Describe one model; `?format=1` adds how it writes calls and thoughts."""
    spec = services().registry.resolve(model_id)
    services().store.check_exists(spec)
    described = _described(spec, services().swapper.status()) | _answers(spec)
    return {**described, "id": model_id, "metadata": _metadata(spec)}


@blueprint.at("/v1/models", methods=["POST"])
@scope("admin")
@blueprint.takes(LoadRequest, example={"model": "smollm2-135m-instruct"})
@blueprint.gives(LoadAnswer)
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 503, description="The model could not be loaded")
def load_model(body: dict[str, Any]) -> Any:
    """Load a model, in place of the one in memory.

    Answers once it is loaded, which may take minutes. Running answers are finished first.
    """
    model_id, device = body["model"], body.get("device", "auto")
    if device != "auto" and device not in services().devices():
        raise InvalidRequest(f"This machine has no device '{device}'", param="device")
    spec = services().registry.resolve(model_id)
    if spec.upstream is not None:
        raise upstream_refusal(spec, "it is not loaded here")
    with RequestContext(services()) as context:
        context.take_place()
        loaded = services().swapper.load(
            model_id,
            device=None if device == "auto" else device,
            client=context.client,
            cancellation=context.cancellation,
        )
    status = services().swapper.status()
    return {
        "id": model_id,
        "object": "model",
        "created": _created(spec),
        "owned_by": _owner(spec),
        "status": "loaded" if loaded else "already_loaded",
        "device": (status.device if status.model == spec.resident.name else None) or device,
    }


@blueprint.at("/v1/models/<path:model_id>", methods=["DELETE"])
@scope("admin")
@blueprint.gives(Deleted)
@blueprint.gives(Error, 404, description="Not in memory")
def unload_model(model_id: str) -> Any:
    """Take a model out of memory, once its running answers are finished."""
    with RequestContext(services()) as context:
        context.take_place()
        evicted = services().swapper.evict(model_id, cancellation=context.cancellation)
    if not evicted and not _unload_encoder(model_id):
        raise NotFound(f"Model '{model_id}' is not loaded", param="model")
    return {"id": model_id, "object": "model", "deleted": True}


def _servable(status: SwapperStatus) -> list[ModelSpec]:
    """Registered entries, then what lies in the Hub's cache, then the resident; each once."""
    specs = {spec.name: spec for spec in services().registry.list()}
    repos = {spec.source.repo for spec in specs.values() if isinstance(spec.source, HubSource)}
    others = [repo for repo in services().store.cached_hub_repos() if repo not in repos]
    for model_id in [*others, *([status.model] if status.model else [])]:
        try:
            spec = services().registry.resolve(model_id)
        except ModelNotFound:  # cached, but not allowed
            continue
        specs.setdefault(spec.name, spec)
    return list(specs.values())


def _described(spec: ModelSpec, status: SwapperStatus) -> dict[str, Any]:
    created = _created(spec)
    described = {
        "id": spec.name,
        "object": "model",
        "type": "model",
        "display_name": spec.name,
        "created": created,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "owned_by": _owner(spec),
        "loaded": status.holds(spec.name) or _encoder() == spec.name or spec.upstream is not None,
        "permission": [],
        "root": spec.resident.name,
        "parent": None if spec.base is None else spec.base.name,
    }
    described |= _abilities(spec)
    if status.holds(spec.name) and status.max_model_len is not None:
        described["max_model_len"] = status.max_model_len
        described["quantization"] = status.quantization
    if (reason := services().store.refusal(spec)) is not None:
        described |= {"servable": False, "reason": services().private_paths.hide(reason)}
    return described


def _abilities(spec: ModelSpec) -> dict[str, Any]:
    """Its capabilities, place and size, by small files alone."""
    store, settings = services().store, services().settings
    path = store.path(spec)
    facts = FileFacts() if path is None else read_facts(path)
    return {
        "capabilities": capabilities(
            spec,
            facts,
            refused=store.refusal(spec) is not None,
            embeds=settings.enable_embeddings_backend,
            inspects=settings.inspect_enabled,
        ),
        "local": path is not None,
        "size_bytes": facts.size_bytes if spec.adapter is None else store.adapters.size(spec),
        "context_length": context_length(spec, store.describe(spec).config),
    }


def _answers(spec: ModelSpec) -> dict[str, Any]:
    """The facts of its answers by its tokenizer; empty where that is not here, or of no use."""
    if (text := _text(spec)) is None:
        return {}
    try:
        facts = answer_facts(text)
    except ApiError:
        return {}
    answers: dict[str, Any] = {"structured_outputs": facts.structured_outputs}
    if facts.tools is None:
        return answers
    answers |= {"tools": facts.tools, "reasoning": facts.thoughts is not None}
    if request.args.get("format") in ("1", "true"):
        styles = {"calls": facts.calls, "thoughts": facts.thoughts}
        answers["format"] = {k: style and style_fields(style) for k, style in styles.items()}
    return answers


def _text(spec: ModelSpec) -> ModelText | None:
    """The tokenizer, with the resident model or from files that are here; None: there is none."""
    resident = under_entry(services().swapper.resident(), spec)
    if resident is not None:
        return resident
    store = services().store
    if (
        spec.encoder
        or spec.upstream
        or store.locate(spec) is None
        or store.refusal(spec) is not None
    ):
        return None
    if services().swapper.status().loading is not None:  # who reads one waits for that
        return None
    try:
        return services().text_of(spec)
    except ApiError:
        return None


def _encoder() -> str | None:
    models = services().embeddings
    return models.encoder if models else None


def _unload_encoder(model_id: str) -> bool:
    models = services().embeddings
    is_loaded = _encoder() == services().registry.resolve(model_id).name
    return is_loaded and models is not None and models.give_back(0)


def _created(spec: ModelSpec) -> int:
    """The time its files came to this machine; of what is not here, the server's start."""
    store = services().store
    folder = store.adapters.locate(spec) or store.locate(spec)
    return services().created if folder is None else int(folder.stat().st_mtime)


def _owner(spec: ModelSpec) -> str:
    if spec.upstream is not None:
        return "upstream"
    return "huggingface" if isinstance(spec.adapter or spec.source, HubSource) else "local"


def _metadata(spec: ModelSpec) -> dict[str, Any]:
    source = spec.adapter or spec.source
    facts = {
        "huggingface_repo": source.repo if isinstance(source, HubSource) else None,
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "default_device": spec.device,
        "max_context_tokens": spec.max_context_tokens,
        "is_instruct": spec.is_instruct,
    }
    return {**spec.metadata, **{key: fact for key, fact in facts.items() if fact is not None}}
