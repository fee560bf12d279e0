"""POST /v1/completions and /v1/chat/completions.

Each view is the walk of one request: check, lease the model, make the prompt, fit it, start, and
answer whole or as a stream.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from flask import request

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.request_context import Exchange
from transformers_api.api.http.services import services
from transformers_api.api.openai import format as openai_format
from transformers_api.api.openai import requests
from transformers_api.api.openai.format import Head
from transformers_api.api.openai.schemas.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Error,
)
from transformers_api.api.openai.schemas.chat import ChatRequest
from transformers_api.api.openai.schemas.completions import CompletionRequest
from transformers_api.api.trace.format import TraceWriter
from transformers_api.serving.generation import collect
from transformers_api.serving.models.spec import LoadedModel
from transformers_api.serving.text import chat_template

blueprint = Blueprint("openai", __name__, description="OpenAI's completions and chat completions")
# What the pages of the documentation fill in to try a route out.
CHAT_EXAMPLE = {
    "messages": [{"role": "user", "content": "Name three colours of the sea."}],
    "max_tokens": 40,
    "stream": False,
}
COMPLETION_EXAMPLE = {"prompt": "The colour of the sea is", "max_tokens": 20, "temperature": 0}


@blueprint.at("/v1/chat/completions", methods=["POST"])
@blueprint.takes(ChatRequest, example=CHAT_EXAMPLE)
@blueprint.gives(ChatCompletion)
@blueprint.gives(ChatCompletionChunk, content_type="text/event-stream")
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 429, description="Too much is waiting; `Retry-After` says how long")
def chat_completions(body: dict[str, Any]) -> Any:
    """Answer a conversation.

    With `stream` the answer comes as server-sent events, each a `chat.completion.chunk`, and ends
    with `data: [DONE]`. An error after the first byte is an event with `error`, and no `[DONE]`.
    """
    known = services()
    if "trace" in body:
        inspect_auth.check_enabled()
    texts = requests.message_texts(body["messages"])
    requests.check_prompt_bytes(texts, known.settings, "messages")
    requests.check_sequences(1, body["n"], known.settings)
    chat_template.check_enabled(
        known.registry.resolve(body.get("model") or known.settings.default_model)
    )
    with Exchange(known, request.environ) as exchange:
        model = exchange.lease(body.get("model"))
        prompt = requests.chat_prompt(model, body)
        quiet_s = known.settings.keepalive_s if body["stream"] else None
        wanted = requests.chat_request(model, body, prompt, quiet_s)
        wanted = requests.with_trace(model, body, wanted, known.settings)
        generation = exchange.start(model, wanted, stream=body["stream"])
        head = _head("chatcmpl", model, body, [prompt.ids], body["logprobs"])
        if body["stream"]:
            chunks = openai_format.chat_chunks(head, generation)
            return exchange.stream(known.completions.after(chunks, head.id, model, generation))
        choices = collect(generation)
        known.completions.remember(head.id, model, head.prompts, [c.token_ids for c in choices])
        return openai_format.chat_completion(head, choices, generation.usage)


@blueprint.at("/v1/completions", methods=["POST"])
@blueprint.takes(CompletionRequest, example=COMPLETION_EXAMPLE)
@blueprint.gives(Completion)
@blueprint.gives(Completion, content_type="text/event-stream")
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 429, description="Too much is waiting; `Retry-After` says how long")
def completions(body: dict[str, Any]) -> Any:
    """Continue texts.

    With `echo`, `logprobs` and `max_tokens` 0 it scores the prompts and generates nothing. With
    `stream` the answer comes as server-sent events and ends with `data: [DONE]`.
    """
    known = services()
    if "trace" in body:
        inspect_auth.check_enabled()
    prompts = body["prompt"]
    given = [prompt for prompt in prompts if isinstance(prompt, str)]
    requests.check_prompt_bytes(given, known.settings, "prompt")
    requests.check_sequences(len(prompts), body.get("best_of", body["n"]), known.settings)
    with Exchange(known, request.environ) as exchange:
        model = exchange.lease(body.get("model"))
        ids = requests.prompt_ids(model, prompts)
        quiet_s = known.settings.keepalive_s if body["stream"] else None
        wanted = requests.completion_request(model, body, ids, quiet_s)
        wanted = requests.with_trace(model, body, wanted, known.settings)
        generation = exchange.start(model, wanted, stream=body["stream"])
        head = _head("cmpl", model, body, ids, "logprobs" in body)
        texts = _texts(model, prompts) if body["echo"] or head.with_logprobs else [""] * len(ids)
        if body["stream"]:
            chunks = openai_format.completion_chunks(head, texts, body["echo"], generation)
            return exchange.stream(known.completions.after(chunks, head.id, model, generation))
        choices = collect(generation)
        known.completions.remember(head.id, model, head.prompts, [c.token_ids for c in choices])
        return openai_format.completion(head, texts, body["echo"], choices, generation.usage)


def _texts(model: LoadedModel, prompts: Sequence[str | list[int]]) -> list[str]:
    return [p if isinstance(p, str) else chat_template.decode_ids(model, p) for p in prompts]


def _head(
    prefix: str,
    model: LoadedModel,
    body: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    with_logprobs: bool,
) -> Head:
    return Head(
        id=openai_format.new_id(prefix),
        created=int(time.time()),
        model=body.get("model") or model.spec.name,
        fingerprint=model.fingerprint,
        prompts=prompts,
        n=body["n"],
        with_logprobs=with_logprobs,
        with_token_ids=body["return_token_ids"],
        with_usage=body.get("stream_options", {}).get("include_usage", False),
        traces=_traces(model, body, prompts) if "trace" in body else None,
    )


def _traces(
    model: LoadedModel, body: Mapping[str, Any], prompts: Sequence[Sequence[int]]
) -> TraceWriter:
    spans = requests.message_spans(model, body, prompts[0]) if "messages" in body else []
    return TraceWriter(model, body["trace"], prompts, spans)
