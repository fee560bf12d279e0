"""The native API: POST /generate, and /models to list, load, poll and unload.

The routes of the TinyGPT service and of the Flask wrapper. Their errors are ``{"detail": text}``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from flask import g, request

from transformers_api.api.http.auth import scope
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import PLAIN
from transformers_api.api.http.error_schemas import Detail
from transformers_api.api.http.request_context import Formatter, RequestContext, Task, answer
from transformers_api.api.http.services import services
from transformers_api.api.openai import requests
from transformers_api.api.seeds import generate_format
from transformers_api.api.seeds.generate_format import GenerateFormatter, Heading
from transformers_api.api.seeds.schemas.generate import (
    Done,
    Generated,
    GenerateRequest,
    LoadModelAnswer,
    LoadModelRequest,
    NativeModel,
    NativeModelState,
)
from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NotFound
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.residency import SwapperStatus

blueprint = Blueprint("native", __name__, dialect=PLAIN, description="The native API")

DEFAULTS: Mapping[str, Any] = {
    "max_new_tokens": 100,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "word_repetition_penalty": 1.0,
}
DOCUMENTED_MOST = 500  # new tokens; a window that moves on is no limit of its own
_EXTRAS = ("seed", "stop")  # among the parameters of an answer where they were given


@blueprint.at("/generate", methods=["POST"])
@blueprint.takes(GenerateRequest, example={"prompt": "Once upon a time", "max_new_tokens": 40})
@blueprint.gives(Generated)
@blueprint.gives(Generated, content_type="text/event-stream")
@blueprint.gives(Detail, 400, description="A field is wrong; the text names it")
@blueprint.gives(Detail, 404, description="No such model")
@blueprint.gives(Detail, 503, description="The model is not loaded, or cannot be")
def generate(body: dict[str, Any]) -> Any:
    """Continue a text, or a list of texts together.

    For a list `generated_text`, `prompt`, `tokens_generated` and `finish_reason` are lists in the
    same order, also for a list of one; the times are those of all together. With `stream` the
    answer is that of `/generate/stream`.
    """
    return answer(GenerateTask(body, is_streamed=body["stream"]))


@blueprint.at("/generate/stream", methods=["POST"])
@blueprint.takes(GenerateRequest, example={"prompt": "Once upon a time", "max_new_tokens": 40})
@blueprint.gives(Generated, content_type="text/event-stream")
@blueprint.gives(Detail, 400, description="A field is wrong; the text names it")
@blueprint.gives(Detail, 404, description="No such model")
@blueprint.gives(Detail, 503, description="The model is not loaded, or cannot be")
def generate_stream(body: dict[str, Any]) -> Any:
    """Continue a text, or a list of texts, as server-sent events.

    Each event is `{"index": 0, "text": …}`, the next piece of the continuation of the prompt with
    that index. The last one is the answer of `/generate` with `"done": true`; `data: [DONE]`
    follows. An error after the first byte is an event with `detail`, and no `[DONE]`.
    """
    return answer(GenerateTask(body, is_streamed=True))


@blueprint.at("/models")
@blueprint.gives(NativeModel(many=True))  # type: ignore[arg-type]
def list_models() -> Any:
    """List the registered models, and what is in memory."""
    registry, status = services().registry, services().swapper.status()
    specs = {spec.name: spec for spec in registry.list()}
    if status.model is not None and status.model not in specs:
        specs[status.model] = registry.resolve(status.model)
    return [_described(spec, status) for spec in specs.values()]


@blueprint.at("/models/<path:model_name>")
@blueprint.gives(NativeModelState)
@blueprint.gives(Detail, 404, description="No such model")
def retrieve_model(model_name: str) -> Any:
    """Describe one model, and how far its loading is."""
    spec = services().registry.resolve(model_name)
    services().store.check_exists(spec)
    status = services().swapper.status()
    error = services().private_paths.hide(status.last_errors.get(spec.name, ""))
    state = generate_format.model_state(spec, status, error or None)
    return {**_described(spec, status), **state}


@blueprint.at("/models/<path:model_name>/load", methods=["POST"])
@scope("admin")
@blueprint.gives(Done)
@blueprint.gives(Detail, 404, description="No such model")
def load_in_background(model_name: str) -> Any:
    """Begin to load a model and answer at once; GET /models/{model_name} tells how far it is."""
    _check_origin()
    has_begun = services().swapper.load(model_name, client=g.client, wait=False)
    state = f"Loading model '{model_name}' in background"
    return {"message": state if has_begun else f"Model '{model_name}' is already loaded"}


@blueprint.at("/models/<path:model_name>/unload", methods=["DELETE", "POST"])
@scope("admin")
@blueprint.gives(Done)
@blueprint.gives(Detail, 404, description="Not in memory")
def unload(model_name: str) -> Any:
    """Take a model out of memory, once its running answers are finished.

    A load that has not begun to read it, such as a download, is cancelled.
    """
    _check_origin()
    with RequestContext(services()) as context:
        context.take_place()
        evicted = _evicted(model_name, context.cancellation)
    if not evicted:
        raise NotFound(f"Model '{model_name}' is not loaded", param="model")
    return {"message": f"Model '{model_name}' unloaded successfully"}


@blueprint.at("/load_model", methods=["POST"])
@scope("admin")
@blueprint.takes(LoadModelRequest, example={"model_name": "smollm2-135m-instruct"})
@blueprint.gives(LoadModelAnswer)
@blueprint.gives(Detail, 400, description="A field is wrong; the text names it")
@blueprint.gives(Detail, 404, description="No such model")
@blueprint.gives(Detail, 503, description="The model could not be loaded")
def load_model(body: dict[str, Any]) -> Any:
    """Load a model and answer when it is in memory, which may take minutes."""
    name = body["model_name"]
    with RequestContext(services()) as context:
        context.take_place()
        services().swapper.load(name, client=context.client, cancellation=context.cancellation)
    return {"message": f"Model {name} loaded successfully", **body}


class GenerateTask(Task):
    """A text, or a list of texts, to be continued once each."""

    field = "prompt"

    def __init__(self, body: Mapping[str, Any], *, is_streamed: bool) -> None:
        prompt = body["prompt"]
        self.body = body
        self.model_id: str | None = body.get("model")
        self.is_streamed = is_streamed
        self.texts = [prompt] if isinstance(prompt, str) else prompt
        self.prompts = len(self.texts)
        self.began = self.encoded = 0.0  # time.perf_counter(), around the encoding

    def prepare(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        """See Task."""
        body = self.body
        self.began = time.perf_counter()
        prompts = requests.prompt_ids(model, self.texts)
        self.encoded = time.perf_counter()
        # The request's word, else the registry's, else this route's.
        registered = requests.registered_options(model)
        options = {**DEFAULTS, **registered, **body}
        params = SamplingParams(
            max_tokens=_max_tokens(model, body, prompts),
            temperature=options["temperature"],
            top_k=max(options["top_k"], 0),
            top_p=options["top_p"],
            word_repetition_penalty=options["word_repetition_penalty"],
            seed=options.get("seed"),
        )
        # What a model writes to end its text, such as TinyGPT2's literal <|endoftext|>, is its own
        # end.
        stop = (*requests.stop_strings(registered), *body.get("stop", ()))
        quiet_s = settings.keepalive_s if self.is_streamed else None
        return GenerationRequest(prompts, params, stop=stop, quiet_s=quiet_s)

    def formatter(self, model: LoadedModel, request: GenerationRequest) -> Formatter:
        """See Task."""
        body = self.body
        heading = Heading(
            model=body.get("model") or model.spec.name,
            prompts=self.texts,
            is_batch=isinstance(body["prompt"], list),
            full_text=body["return_full_text"],
            parameters=_parameters(request.params, body),
        )
        return GenerateFormatter(heading, request.prompts, self.began, self.encoded)


def _max_tokens(model: LoadedModel, body: Mapping[str, Any], ids: Sequence[Sequence[int]]) -> int:
    """All prompts share one limit; a default is cut to what the longest of them leaves."""
    name = next((name for name in ("max_new_tokens", "max_length") if name in body), None)
    default = model.spec.generation.get("max_tokens") or DEFAULTS["max_new_tokens"]
    max_tokens: int = body[name] if name else default
    window = model.engine.max_model_len
    if model.engine.context_overflow is None:
        limits = (
            requests.fit(
                max_tokens,
                len(prompt),
                window,
                explicit=name is not None,
                param="prompt",
                max_tokens_param=name or "max_new_tokens",
            )
            for prompt in ids
        )
        return min(limits)
    most = max(window, DOCUMENTED_MOST)
    if name and max_tokens > most:
        raise ContextLengthExceeded(f"'{name}' must be at most {most} for this model", param=name)
    return min(max_tokens, most)


def _parameters(params: SamplingParams, body: Mapping[str, Any]) -> dict[str, Any]:
    used = {name: getattr(params, name) for name in DEFAULTS if name != "max_new_tokens"}
    extras = {name: body[name] for name in _EXTRAS if name in body}
    return {"max_new_tokens": params.max_tokens, **used, **extras}


def _described(spec: ModelSpec, status: SwapperStatus) -> dict[str, Any]:
    store, reason = services().store, services().store.refusal(spec)
    refusal = reason and services().private_paths.hide(reason)
    return generate_format.model(spec, store.describe(spec), refusal, status)


def _check_origin() -> None:
    """Any web page may POST without a body; elsewhere the JSON body makes its browser ask first."""
    origin = request.headers.get("Origin")
    if origin is None or origin in services().settings.cors_allow_origins:
        return
    if urlsplit(origin).netloc != request.host:
        raise InvalidRequest(f"Pages of {origin} may not do that; see CORS_ALLOW_ORIGINS")


def _evicted(model_name: str, cancellation: Cancellation) -> bool:
    try:
        return services().swapper.evict(model_name, cancellation=cancellation)
    except ModelNotFound:  # what is unknown is not loaded either
        return False
