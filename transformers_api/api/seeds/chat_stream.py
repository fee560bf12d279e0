"""POST /chat/stream: an answer and what the model looked at, token by token.

The route of niels-gpt, for every model. Its errors are those of ``dialect.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from flask import request

from transformers_api.api.http import inspect_auth, sse
from transformers_api.api.http.dialects import InspectionBlueprint
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import Exchange
from transformers_api.api.http.services import Services, services
from transformers_api.api.openai import format as openai_format
from transformers_api.api.seeds.schemas.chat_stream import ChatStreamDone, ChatStreamRequest
from transformers_api.api.trace.format import TraceWriter, header
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import ContextLengthExceeded
from transformers_api.inspection.base import StepTrace
from transformers_api.serving.generation import Generation, GenerationRequest, fit
from transformers_api.serving.inspect import trace_plan
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.models.spec import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.chat_template import ChatPrompt
from transformers_api.serving.text.spans import spans
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = InspectionBlueprint("chat_stream", __name__, description="Answers with their traces")

DEFAULTS: Mapping[str, Any] = {
    "max_new_tokens": 256,
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 1.0,
    "seed": 42,
}
DEFAULT_TRACE = TraceRequest(attn="json", topk=10)
MOST_BEYOND_THE_WINDOW = 4096  # new tokens, of models whose window moves on
EXAMPLE = {
    "messages": [{"role": "user", "content": "tell me about niels"}],
    "max_new_tokens": 20,
    "trace_layer": 0,
}


@blueprint.at("/chat/stream", methods=["POST"])
@blueprint.takes(ChatStreamRequest, example=EXAMPLE)
@blueprint.gives(ChatStreamDone, content_type="text/event-stream")
@blueprint.gives(Failed, 413, description="The conversation has too many bytes")
@blueprint.gives(Failed, 429, description="Asked too often; `Retry-After` says when to come again")
@blueprint.gives(Failed, 503, description="The server is still starting, or the model cannot load")
def chat_stream(body: dict[str, Any]) -> Any:
    """Answer a conversation and show what the model looked at.

    Server-sent events with names: for each token `token` and then `trace`, in the end one `done`
    with the whole `reply`. An error after the first byte is an event `error`, and no `done`.
    """
    inspect_auth.admit()
    known = services()
    name = body.get("model") or known.settings.default_model
    chat_template.check_enabled(known.registry.resolve(name))
    with Exchange(known, request.environ) as exchange:
        model = exchange.lease(name)
        prompt = chat_template.encode(
            model, body["messages"], max_bytes=known.settings.inspected_prompt_bytes
        )
        asked = _asked(model, body)
        wanted = _request(known, model, body, prompt, asked)
        answer = _Answer(known, model, body, wanted, asked)
        if not wanted.params.max_tokens:
            return exchange.stream_named(answer.events(None))
        generation = exchange.start(model, wanted, stream=True)
        return exchange.stream_named(answer.events(generation))


class _Answer:
    """What is sent of one generation."""

    def __init__(
        self,
        known: Services,
        model: LoadedModel,
        body: Mapping[str, Any],
        wanted: GenerationRequest,
        asked: TraceRequest,
    ) -> None:
        self.id = openai_format.new_id("chatcmpl")
        self._known = known
        self._model = model
        self._body = body
        self._prompt = wanted.prompts[0]
        self._asked = asked
        assert model.inspector is not None  # else there would be no plan
        self._anatomy = model.inspector.anatomy
        self._words = Vocabulary(model.tokenizer)
        self._writer = TraceWriter(model, asked, wanted.prompts)

    def events(self, generation: Generation | None) -> Iterator[bytes | None]:
        """One frame after the other; None for each time of silence. No generation: no token."""
        if self._asked.meta:
            yield sse.frame(self._meta(), "meta")
        text, reason = "", "length"
        for delta in generation or ():
            if delta is None:
                yield None
                continue
            text += delta.text
            reason = delta.finish_reason or reason
            if delta.trace is not None:
                yield sse.frame(self._token(delta.trace), "token")
                yield sse.frame(self._writer.event(delta.trace), "trace")
        yield sse.frame(self._done(text, reason, generation), "done")

    def _token(self, trace: StepTrace) -> dict[str, Any]:
        token_id, words = trace.token_id, self._words
        return {
            "step": trace.step,
            "token_id": token_id,
            "token_text": "" if token_id in words.special_ids else words.decoded(token_id),
            "token_display": words.display(token_id),
            "position": trace.position,
        }

    def _meta(self) -> dict[str, Any]:
        messages = self._body["messages"]
        told = header(
            self._anatomy, self._words, self._prompt, spans(self._model, messages, self._prompt)
        )
        return {**told, **told["model"], "model": self._model.spec.name}

    def _done(self, text: str, reason: str, generation: Generation | None) -> dict[str, Any]:
        written = generation.choices[0].token_ids if generation else []
        # Before the client can have read the name and ask for what it names.
        self._known.completions.remember(self.id, self._model, [self._prompt], [written])
        return {
            "reply": text.strip(),
            "finish_reason": reason,
            "completion_id": self.id,
            "usage": {
                "prompt_tokens": len(self._prompt),
                "completion_tokens": len(written),
                "trace": self._writer.usage,
            },
        }


def _request(
    known: Services,
    model: LoadedModel,
    body: Mapping[str, Any],
    prompt: ChatPrompt,
    asked: TraceRequest,
) -> GenerationRequest:
    """The request's word, else the registry's, else this route's."""
    registered = {key: value for key, value in model.spec.generation.items() if value is not None}
    options = {**DEFAULTS, **registered, **body}
    params = SamplingParams(
        max_tokens=_max_tokens(model, body, len(prompt.ids)),
        temperature=options["temperature"],
        top_k=max(options["top_k"] or 0, 0),
        top_p=options["top_p"],
        seed=options["seed"],
        stop_token_ids=prompt.stop_token_ids,
    )
    plan = trace_plan.plan(
        model,
        asked,
        known.settings,
        prompt_tokens=len(prompt.ids),
        max_tokens=params.max_tokens,
    )
    # What a model writes to end its text is its own end, whatever else the request names.
    stop = (*prompt.stop, *_stops(registered), *body.get("stop", ()))
    return GenerationRequest(
        [prompt.ids],
        params,
        stop=stop,
        quiet_s=known.settings.keepalive_s,
        trace=plan,
        trace_stops=asked.specials,
    )


def _asked(model: LoadedModel, body: Mapping[str, Any]) -> TraceRequest:
    """``trace_layer`` is the first of the layers, and is named where it is out of range."""
    asked: TraceRequest = body.get("trace") or DEFAULT_TRACE
    asked = replace(asked, sampled_topk=asked.topk)
    if "trace_layer" not in body:
        return asked
    others = asked.layers
    if others == "all":
        others = tuple(model.inspector.anatomy.layers_with_attention) if model.inspector else ()
    return replace(asked, layers=(body["trace_layer"], *others), layers_name="trace_layer")


def _stops(registered: Mapping[str, Any]) -> tuple[str, ...]:
    stop = registered.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _max_tokens(model: LoadedModel, body: Mapping[str, Any], prompt_tokens: int) -> int:
    """What is not asked for is cut to what the prompt leaves."""
    default = model.spec.generation.get("max_tokens") or DEFAULTS["max_new_tokens"]
    wanted: int = body.get("max_new_tokens", default)
    window, is_asked = model.engine.max_model_len, "max_new_tokens" in body
    if model.engine.context_overflow is None:
        return fit(
            wanted,
            prompt_tokens,
            window,
            explicit=is_asked,
            param="messages",
            max_tokens_param="max_new_tokens",
        )
    most = max(window, MOST_BEYOND_THE_WINDOW)
    if is_asked and wanted > most:
        raise ContextLengthExceeded(
            f"max_new_tokens must be at most {most} for this model", param="max_new_tokens"
        )
    return min(wanted, most)
