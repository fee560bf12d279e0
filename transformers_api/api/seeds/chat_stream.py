"""POST /chat/stream: an answer and what the model looked at, token by token.

The route of niels-gpt, for every model. Its dialect is NIELS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import Formatter, Task, answer
from transformers_api.api.intervene import format as intervene_format
from transformers_api.api.intervene.branch import branch_ids, with_branch
from transformers_api.api.openai import format as openai_format
from transformers_api.api.openai import requests
from transformers_api.api.seeds.schemas.chat_stream import ChatStreamDone, ChatStreamRequest
from transformers_api.api.trace.format import TraceWriter, header
from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import ContextLengthExceeded
from transformers_api.inspection.base import StepTrace
from transformers_api.serving.generation import Generation, GenerationRequest
from transformers_api.serving.inspect import trace_plan
from transformers_api.serving.inspect.interventions import PlannedEdits
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.choice_text import TextDelta
from transformers_api.serving.text.spans import spans
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint(
    "chat_stream", __name__, dialect=NIELS, description="Answers with their traces"
)

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
    inspect_auth.check()
    return answer(ChatStreamTask(body))


class ChatStreamTask(Task):
    """A conversation to be answered once, with a trace of every token."""

    field = "messages"
    is_chat = True
    is_streamed = True
    texts: Sequence[str] = ()  # the bytes of the prompt are counted, as the model reads it

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.model_id: str | None = body.get("model")
        self.trace: TraceRequest = DEFAULT_TRACE

    def prepare(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        """See Task."""
        body = self.body
        prompt = chat_template.encode(
            model, body["messages"], max_bytes=settings.inspected_prompt_bytes
        )
        prompt = replace(prompt, ids=branch_ids(body, model) or prompt.ids)
        trace = self.trace = _trace_request(model, body)
        # The request's word, else the registry's, else this route's.
        registered = requests.registered_options(model)
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
            trace,
            settings,
            prompt_tokens=len(prompt.ids),
            max_tokens=params.max_tokens,
        )
        # What a model writes to end its text is its own end, whatever else the request names.
        stop = (*prompt.stop, *requests.stop_strings(registered), *body.get("stop", ()))
        request = GenerationRequest(
            [prompt.ids],
            params,
            stop=stop,
            quiet_s=settings.keepalive_s,
            trace=plan,
            trace_options=trace,
            trace_stops=trace.specials,
            intervene=body.get("intervene"),
            spans=lambda: spans(model, body["messages"], prompt.ids),
        )
        return with_branch(request, body)

    def formatter(self, model: LoadedModel, request: GenerationRequest) -> Formatter:
        """See Task."""
        (prompt,) = request.prompts
        messages, edits = self.body["messages"], request.edits
        return ChatStreamFormatter(model, messages, prompt, self.trace, edits, request.run)


class ChatStreamFormatter(Formatter):
    """The named events of one answer."""

    dialect = NIELS

    def __init__(
        self,
        model: LoadedModel,
        messages: Sequence[Mapping[str, Any]],
        prompt: Sequence[int],
        trace: TraceRequest,
        edits: Sequence[PlannedEdits] = (),
        run: str | None = None,
    ) -> None:
        self.completion_id = openai_format.new_id("chatcmpl")
        self.prompts = [prompt]
        self._model = model
        self._messages = messages
        self._has_meta = trace.meta
        self._edits = edits
        self._run = {} if run is None else {"run": run}
        assert model.inspector is not None  # else there would be no plan
        self._anatomy = model.inspector.anatomy
        self._vocabulary = Vocabulary(model.tokenizer)
        self._writer = TraceWriter(model, trace, self.prompts)
        self._text, self._reason = "", "length"

    def whole(self, generation: Generation) -> Any:
        """The last event of the stream."""
        for delta in generation:
            if delta is not None:
                self._take(delta)
        return self._done(generation)

    def opening(self) -> Iterator[bytes]:
        """``meta``, where it was asked for."""
        if self._has_meta:
            yield self.dialect.frame(self._meta(), "meta")

    def frames(self, delta: TextDelta) -> Iterator[bytes]:
        """``token`` and then ``trace``."""
        self._take(delta)
        if delta.trace is not None:
            yield self.dialect.frame(self._token(delta.trace), "token")
            yield self.dialect.frame(self._writer.event(delta.trace), "trace")

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """``done``, with the whole answer."""
        yield self.dialect.frame(self._done(generation), "done")

    def _take(self, delta: TextDelta) -> None:
        self._text += delta.text
        self._reason = delta.finish_reason or self._reason

    def _token(self, trace: StepTrace) -> dict[str, Any]:
        token_id, vocabulary = trace.token_id, self._vocabulary
        is_special = token_id in vocabulary.special_ids
        return {
            "step": trace.step,
            "token_id": token_id,
            "token_text": "" if is_special else vocabulary.decoded(token_id),
            "token_display": vocabulary.display(token_id),
            "position": trace.position,
        }

    def _meta(self) -> dict[str, Any]:
        (prompt,) = self.prompts
        places = spans(self._model, self._messages, prompt)
        content = header(self._anatomy, self._vocabulary, prompt, places)
        edits = intervene_format.header(self._edits, 0)
        model = {**content["model"], "model": self._model.spec.name}
        return {**content, **model, **edits, **self._run}

    def _done(self, generation: Generation | None) -> dict[str, Any]:
        written = generation.choices[0].token_ids if generation else []
        return {
            "reply": self._text.strip(),
            "finish_reason": self._reason,
            "completion_id": self.completion_id,
            "usage": {
                "prompt_tokens": len(self.prompts[0]),
                "completion_tokens": len(written),
                "trace": self._writer.usage,
                **intervene_format.usage(self._edits, 1),
            },
            **intervene_format.header(self._edits, 0),
            **self._run,
        }


def _trace_request(model: LoadedModel, body: Mapping[str, Any]) -> TraceRequest:
    """``trace_layer`` is the first of the layers, and is named where it is out of range."""
    trace: TraceRequest = body.get("trace") or DEFAULT_TRACE
    trace = replace(trace, sampled_topk=trace.topk)
    if "trace_layer" not in body:
        return trace
    others = trace.layers
    if others == "all":
        others = tuple(model.inspector.anatomy.layers_with_attention) if model.inspector else ()
    return replace(trace, layers=(body["trace_layer"], *others), layers_name="trace_layer")


def _max_tokens(model: LoadedModel, body: Mapping[str, Any], prompt_tokens: int) -> int:
    """The limit of the request; a default is cut to what the prompt leaves."""
    default = model.spec.generation.get("max_tokens") or DEFAULTS["max_new_tokens"]
    max_tokens: int = body.get("max_new_tokens", default)
    window, is_explicit = model.engine.max_model_len, "max_new_tokens" in body
    if model.engine.context_overflow is None:
        return requests.fit(
            max_tokens,
            prompt_tokens,
            window,
            explicit=is_explicit,
            param="messages",
            max_tokens_param="max_new_tokens",
        )
    most = max(window, MOST_BEYOND_THE_WINDOW)
    if is_explicit and max_tokens > most:
        raise ContextLengthExceeded(
            f"max_new_tokens must be at most {most} for this model", param="max_new_tokens"
        )
    return min(max_tokens, most)
