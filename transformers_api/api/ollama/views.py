"""Ollama's routes under /api."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

from transformers_api import __version__
from transformers_api.api.http import request_log
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import OLLAMA
from transformers_api.api.http.error_schemas import Explained
from transformers_api.api.http.request_context import Formatter, RequestContext, answer
from transformers_api.api.http.request_size import check_prompt_bytes
from transformers_api.api.http.services import services
from transformers_api.api.ollama import chat as ollama_chat
from transformers_api.api.ollama.chat import OllamaFormatter, conversation_of, sampling_of
from transformers_api.api.ollama.schema import (
    OllamaChatLine,
    OllamaChatRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaNameRequest,
    OllamaPromptRequest,
    OllamaTags,
    OllamaVector,
    OllamaVectors,
    OllamaVersion,
)
from transformers_api.api.openai.conversation import Conversation
from transformers_api.api.openai.conversation_task import ConversationTask, InfillTask, RawTask
from transformers_api.errors import EmbeddingsUnavailable, InvalidRequest, ModelNotFound, NotOffered
from transformers_api.serving import embeddings
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.models.capabilities import read_facts
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.prompts import choose_prompt, count_prompt_tokens
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.tools.answer_plan import AnswerPlan

Json = dict[str, Any]
blueprint = Blueprint("ollama", __name__, dialect=OLLAMA, description="Ollama's API")
LATEST = ":latest"


@blueprint.at("/api/version")
@blueprint.gives(OllamaVersion)
def ollama_version() -> Any:
    """Give the version of this server."""
    return {"version": __version__}


@blueprint.at("/api/tags")
@blueprint.gives(OllamaTags)
def ollama_tags() -> Any:
    """List the models."""
    specs = services().registry.list()
    servable = (spec for spec in specs if services().store.refusal(spec) is None)
    return {"models": [_listed(spec, 0) for spec in servable]}


@blueprint.at("/api/ps")
@blueprint.gives(OllamaTags)
def ollama_ps() -> Any:
    """List what is in memory."""
    status = services().swapper.status()
    if status.model is None:
        return {"models": []}
    sizes = {status.model: status.bytes} | {
        each.name: each.bytes for each in status.engine.adapters
    }
    residents = [_listed(services().registry.resolve(n), size) for n, size in sizes.items()]
    return {"models": [each | {"size_vram": 0, "expires_at": None} for each in residents]}


@blueprint.at("/api/show", methods=["POST"])
@blueprint.takes(OllamaNameRequest, example={"model": "smollm2-135m-instruct"})
@blueprint.gives({"type": "object"})
@blueprint.gives(Explained, 400, description="A field is wrong; the text names it")
@blueprint.gives(Explained, 404, description="No such model")
def ollama_show(body: dict[str, Any]) -> Any:
    """Describe a model; its template and abilities once it is in memory."""
    name = body.get("model") or body.get("name")
    if name is None:
        raise InvalidRequest("'model' is required", param="model")
    spec = services().registry.resolve(_named(name))
    status = services().swapper.status()
    is_resident = status.holds(spec.name)
    facts: Json = {}
    if is_resident:
        weights = {"transformers_api.weights": dict(status.weights)} if status.weights else {}
        facts = {"general.context_length": status.max_model_len, **weights}
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(spec),
        "model_info": {"general.architecture": "transformers", **facts},
        "capabilities": ["completion", "tools", "thinking"],
        "modified_at": ollama_chat.timestamp(services().created),
    }


@blueprint.at("/api/chat", methods=["POST"])
@blueprint.takes(OllamaChatRequest, example={"messages": [{"role": "user", "content": "Hi"}]})
@blueprint.gives(OllamaChatLine)
@blueprint.gives(OllamaChatLine, content_type="application/x-ndjson")
@blueprint.gives(Explained, 400, description="A field is wrong; the text names it")
@blueprint.gives(Explained, 404, description="No such model")
def ollama_chat_completion(body: dict[str, Any]) -> Any:
    """Answer a conversation, in lines of JSON unless `stream` is false."""
    if not body["messages"]:
        return _loaded(body, is_chat=True)
    conversation = conversation_of(body, body["messages"])
    return answer(_task(body, conversation, is_chat=True))


@blueprint.at("/api/generate", methods=["POST"])
@blueprint.takes(OllamaGenerateRequest, example={"prompt": "The colour of the sea is"})
@blueprint.gives(OllamaChatLine)
@blueprint.gives(OllamaChatLine, content_type="application/x-ndjson")
@blueprint.gives(Explained, 400, description="A field is wrong; the text names it")
@blueprint.gives(Explained, 404, description="No such model")
def ollama_generate(body: dict[str, Any]) -> Any:
    """Answer a prompt, in lines of JSON unless `stream` is false."""
    if not body["prompt"]:
        return _loaded(body, is_chat=False)
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    turns = [*system, {"role": "user", "content": body["prompt"]}]
    return answer(_task(body, conversation_of(body, turns), is_chat=False))


@blueprint.at("/api/embed", methods=["POST"])
@blueprint.takes(OllamaEmbedRequest, example={"model": "all-minilm-l6-v2", "input": "The sea"})
@blueprint.gives(OllamaVectors)
@blueprint.gives(Explained, 400, description="A field is wrong; the text names it")
@blueprint.gives(Explained, 404, description="No such model")
@blueprint.gives(Explained, 501, description="`ENABLE_EMBEDDINGS_BACKEND` is off")
def ollama_embed(body: dict[str, Any]) -> Any:
    """Make a vector of each text."""
    vectors, tokens = _vectors(body["model"], body["input"], "input", body.get("dimensions"))
    return {"model": body["model"], "embeddings": vectors, "prompt_eval_count": tokens}


@blueprint.at("/api/embeddings", methods=["POST"])
@blueprint.takes(OllamaPromptRequest, example={"model": "all-minilm-l6-v2", "prompt": "The sea"})
@blueprint.gives(OllamaVector)
@blueprint.gives(Explained, 400, description="A field is wrong; the text names it")
@blueprint.gives(Explained, 404, description="No such model")
@blueprint.gives(Explained, 501, description="`ENABLE_EMBEDDINGS_BACKEND` is off")
def ollama_embeddings(body: dict[str, Any]) -> Any:
    """Make a vector of one text: the older form of `/api/embed`."""
    vectors, _tokens = _vectors(body["model"], [body["prompt"]], "prompt")
    return {"embedding": vectors[0]}


def _vectors(
    name: str, texts: list[Any], param: str, dimensions: int | None = None
) -> tuple[list[list[float]], int]:
    """The vectors of texts, and how many tokens they had."""
    models = services().embeddings
    if models is None:
        raise EmbeddingsUnavailable("Set ENABLE_EMBEDDINGS_BACKEND=1 to enable embeddings")
    check_prompt_bytes(texts, services().settings, param)
    with RequestContext(services()) as context:
        context.take_place()
        model = context.hold(models.lease(_named(name), context.cancellation))
        record = request_log.current()
        record.model = model.spec.name
        prompt = choose_prompt(model.prompts)
        rows = embeddings.encode(model, texts, prompt=prompt)
        services().limits.reserve(sum(map(len, rows)))
        skipped = count_prompt_tokens(model, texts, prompt)
        vectors = embeddings.embed(
            model, rows, dimensions, context.cancellation, prompt_tokens=skipped
        )
    record.prompt_tokens = sum(map(len, rows))
    numbers = [list(struct.unpack(f"<{len(vector) // 4}f", vector)) for vector in vectors]
    return numbers, record.prompt_tokens


@blueprint.at("/api/<any(pull, push, create, copy):action>", methods=["POST"])
@blueprint.gives(Explained, 501, description="Models are not made or moved through this API")
def ollama_manage(action: str) -> Any:
    """Refuse: the registry and the Hub's cache say what there is."""
    raise NotOffered(f"/api/{action} is not offered: the registry says which models there are")


@blueprint.at("/api/delete", methods=["DELETE"])
@blueprint.gives(Explained, 501, description="Models are not made or moved through this API")
def ollama_delete() -> Any:
    """Refuse: no file is deleted through this API."""
    raise NotOffered("/api/delete is not offered: no file is deleted through this API")


def _task(
    body: Mapping[str, Any], conversation: Conversation, *, is_chat: bool
) -> ConversationTask:
    sampling, most = sampling_of(body)
    name = _named(body["model"]) if "model" in body else None

    def make(model: LoadedModel, request: GenerationRequest, plan: AnswerPlan) -> Formatter:
        label = body.get("model") or model.spec.name
        return OllamaFormatter(label, request.prompts[0], plan, is_chat=is_chat, load_s=0.0)

    options: Json = {
        "model_id": name,
        "is_streamed": body["stream"],
        "texts": [turn["content"] for turn in conversation.messages],
        "sampling": sampling,
        "most_tokens": most,
        "field": "messages" if is_chat else "prompt",
    }
    if body.get("suffix"):
        return InfillTask(conversation, make, suffix=body["suffix"], **options)
    return (RawTask if body.get("raw") else ConversationTask)(conversation, make, **options)


def _loaded(body: Mapping[str, Any], *, is_chat: bool) -> Json:
    """The answer to nothing: the model is in memory now."""
    with RequestContext(services()) as context:
        model = context.lease(_named(body["model"]) if "model" in body else None, is_chat=False)
        label = body.get("model") or model.spec.name
    return ollama_chat.line(label, {"content": ""}, is_chat=is_chat, done=True, done_reason="load")


def _named(name: str) -> str:
    """The id without the tag that these clients add."""
    try:
        services().registry.resolve(name)
    except ModelNotFound:
        return name.removesuffix(LATEST)
    return name


def _listed(spec: ModelSpec, size: int) -> Json:
    return {
        "name": spec.name,
        "model": spec.name,
        "modified_at": ollama_chat.timestamp(services().created),
        "size": size,
        "digest": hashlib.sha256(spec.name.encode()).hexdigest(),
        "details": _details(spec),
    }


def _details(spec: ModelSpec) -> Json:
    path = services().store.path(spec)
    file_type = read_facts(path).file_type if path else ""
    return {
        "parent_model": "" if spec.base is None else spec.base.name,
        "format": "gguf" if file_type else "safetensors",
        "family": "transformers",
        "families": ["transformers"],
        "parameter_size": "",
        "quantization_level": file_type or spec.quantization or "none",
    }
