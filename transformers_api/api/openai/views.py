"""POST /v1/completions and /v1/chat/completions.

A view makes a task of its body; ``answer`` takes it through the steps that all routes share.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import Formatter, Task, answer, upstream_refusal
from transformers_api.api.intervene.branch import branch_ids, with_branch
from transformers_api.api.openai import format as openai_format
from transformers_api.api.openai import requests, upstream
from transformers_api.api.openai.conversation import (
    Conversation,
    Thinking,
    check_results,
    planned,
)
from transformers_api.api.openai.format import ChatFormatter, CompletionFormatter, Head
from transformers_api.api.openai.planned_chat import PlannedChatFormatter
from transformers_api.api.openai.schemas.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
)
from transformers_api.api.openai.schemas.chat import THINKING_BUDGETS, ChatRequest
from transformers_api.api.openai.schemas.completions import CompletionRequest
from transformers_api.api.openai.structured import constrained, constraint_of
from transformers_api.api.openai.tool_input import tool_use
from transformers_api.api.trace.format import TraceWriter
from transformers_api.config.settings import Settings
from transformers_api.errors import InvalidRequest
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.spans import Span, spans
from transformers_api.serving.tools.answer_plan import AnswerPlan

blueprint = Blueprint(
    "openai",
    __name__,
    dialect=OPENAI,
    description="OpenAI's completions and chat completions",
)
CHAT_DEFAULTS: Mapping[str, Any] = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.9}
COMPLETION_DEFAULTS: Mapping[str, Any] = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0}
# What the pages of the documentation fill in to try a route out.
CHAT_EXAMPLE = {
    "messages": [{"role": "user", "content": "Name three colours of the sea."}],
    "max_tokens": 40,
    "stream": False,
}
CHAT, COMPLETION = ChatRequest(), CompletionRequest()
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
    _check_trace(body)
    return answer(ChatTask(body))


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
    _check_trace(body)
    return answer(CompletionTask(body))


def _check_trace(body: Mapping[str, Any]) -> None:
    if "trace" in body and body["trace"].required:
        inspect_auth.check_enabled()


class ChatTask(Task):
    """A conversation to be answered ``n`` times."""

    field = "messages"
    is_chat = is_relayed = True

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.model_id: str | None = body.get("model")
        self.is_streamed: bool = body["stream"]
        self.texts = message_texts(body["messages"])
        self.conversation = conversation_of(body)
        self.per_prompt: int = body["n"]
        self._plan: AnswerPlan | None = None

    def prepare(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        """See Task."""
        body = self.body
        if model.relay is not None:
            return self._relayed(model, settings)
        prompt = self.conversation.encode(model)
        # The request's word, else the registry's, else the route's.
        fields = {**CHAT_DEFAULTS, **requests.registered_options(model), **body}
        limit = next((n for n in ("max_completion_tokens", "max_tokens") if n in body), None)
        ids = branch_ids(body, model) or requests.truncated(
            body, prompt.ids, model, fields[limit or "max_tokens"], explicit=limit is not None
        )
        max_tokens = requests.fit(
            fields[limit or "max_tokens"],
            len(ids),
            model.engine.max_model_len,
            explicit=limit is not None,
            param="messages",
            max_tokens_param=limit or "max_tokens",
        )
        goes_on = fields.get("ignore_eos", False)  # then the end of a turn ends nothing either
        params = requests.sampling_params(
            model,
            fields,
            max_tokens,
            stop_token_ids=frozenset() if goes_on else prompt.stop_token_ids,
            logprobs=body.get("top_logprobs", 0) if body["logprobs"] else None,
            prompt_logprobs=body.get("prompt_logprobs"),
        )
        request = GenerationRequest(
            [ids],
            params,
            n=body["n"],
            stop=requests.stop_strings(fields) + (() if goes_on else prompt.stop),
            shows_stop=body["include_stop_str_in_output"],
            quiet_s=settings.keepalive_s if body["stream"] else None,
        )
        self._plan = self.conversation.plan(model, prompt, ignore_eos=goes_on)
        request = planned(request, self._plan, strips_blank=prompt.strips_blank)
        if "branch" in body and self._plan is not None and self._plan.has_parts:
            raise InvalidRequest(
                "branch cannot go with tools or thoughts; use /v1/completions", param="branch"
            )
        request = with_branch(request, body)
        if "intervene" in body:
            request = replace(
                request, intervene=body["intervene"], spans=lambda: self._spans(model, ids)
            )
        return requests.with_trace(request, model, body, settings) if "trace" in body else request

    def _relayed(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        body, self._plan = self.body, upstream.PLAN
        is_legacy = "functions" in body and "tools" not in body
        tools = upstream.tool_fields(self.conversation.use) if is_legacy else {}
        return upstream.relayed(model, body, CHAT, "chat/completions", settings, fields=tools)

    def _spans(self, model: LoadedModel, prompt: Sequence[int]) -> Sequence[Span]:
        options = self.conversation.template_options(model)
        return spans(model, self.body["messages"], prompt, **options)

    def formatter(self, model: LoadedModel, request: GenerationRequest) -> Formatter:
        """See Task."""
        body, places = self.body, list[Span]()
        if request.trace is not None:
            (prompt,) = request.prompts
            places += self._spans(model, prompt)
        logprobs = body.get("top_logprobs", 0) if body["logprobs"] else None
        head = _head("chatcmpl", model, body, request, logprobs, places)
        if self._plan is None or not self._plan.has_parts:
            return ChatFormatter(head)
        return PlannedChatFormatter(
            head,
            self._plan,
            is_legacy="functions" in body and "tools" not in body,
            with_reasoning=body.get("include_reasoning", True)
            and not body.get("reasoning", {}).get("excluded", False),
        )


class CompletionTask(Task):
    """Texts, or token ids, to be continued ``n`` times each."""

    field = "prompt"
    is_relayed = True

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.model_id: str | None = body.get("model")
        self.is_streamed: bool = body["stream"]
        self.suffix: str | None = body.get("suffix") or None
        self.texts = [prompt for prompt in body["prompt"] if isinstance(prompt, str)]
        self.texts.append(self.suffix or "")
        self.form = constraint_of(body)
        if self.form is not None and body.get("max_tokens") == 0:
            raise InvalidRequest("A format needs 'max_tokens' above 0", param="max_tokens")
        self.prompts = len(body["prompt"])
        self.per_prompt: int = body.get("best_of", body["n"])

    def prepare(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        """See Task."""
        body = self.body
        if model.relay is not None:
            return self._relayed(model, settings)
        fields = {**COMPLETION_DEFAULTS, **requests.registered_options(model), **body}
        goes_on = fields.get("ignore_eos", False)
        prompts, ends = self.encoded(model, fields["max_tokens"])
        # All prompts share one limit; a default is cut to what the longest of them leaves.
        max_tokens = min(
            requests.fit(
                fields["max_tokens"],
                len(ids),
                model.engine.max_model_len,
                explicit="max_tokens" in body,
                param=self.field,
            )
            for ids in prompts
        )
        logprobs = body.get("logprobs")
        scored = body.get("prompt_logprobs")
        if body["echo"] and (logprobs is not None or max_tokens == 0):
            scored = max(logprobs or 0, scored or 0)
        params = requests.sampling_params(
            model,
            fields,
            max_tokens,
            stop_token_ids=frozenset() if goes_on else ends,
            logprobs=logprobs,
            prompt_logprobs=scored,
        )
        request = GenerationRequest(
            prompts,
            params,
            n=body["n"],
            best_of=body.get("best_of"),
            stop=requests.stop_strings(fields),
            shows_stop=body["include_stop_str_in_output"],
            quiet_s=settings.keepalive_s if body["stream"] else None,
            intervene=body.get("intervene"),
        )
        request = constrained(request, model, self.form, ignore_eos=goes_on)
        request = with_branch(request, body)
        return requests.with_trace(request, model, body, settings) if "trace" in body else request

    def _relayed(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        body = self.body
        prompts = upstream.texts_only(model.spec, body["prompt"])
        if body["echo"] and body.get("logprobs") is not None:
            raise upstream_refusal(model.spec, "'echo' with 'logprobs' needs its tokens", "echo")
        fields = (
            {"prompt": prompts}
            if self.suffix is None
            else {"prompt": prompts, "suffix": self.suffix}
        )
        count = len(body["prompt"])
        return upstream.relayed(
            model, body, COMPLETION, "completions", settings, prompts=count, fields=fields
        )

    def encoded(
        self, model: LoadedModel, max_tokens: int
    ) -> tuple[list[list[int]], frozenset[int]]:
        """The prompts as the model reads them, and the tokens that end answers to them."""
        body, specials = self.body, self.body["add_special_tokens"]
        if (ids := branch_ids(body, model)) is not None:
            if len(body["prompt"]) > 1 or self.suffix is not None or body["echo"]:
                raise InvalidRequest(
                    "branch takes one prompt, and neither 'suffix' nor 'echo'", param="branch"
                )
            return [ids], frozenset()
        if self.suffix is not None:
            return requests.infill_ids(model, body["prompt"], self.suffix, specials)
        prompts = requests.prompt_ids(model, body["prompt"], specials)
        explicit = "max_tokens" in body
        cut = [
            requests.truncated(body, ids, model, max_tokens, explicit=explicit) for ids in prompts
        ]
        return cut, frozenset()

    def formatter(self, model: LoadedModel, request: GenerationRequest) -> Formatter:
        """See Task."""
        body, logprobs = self.body, self.body.get("logprobs")
        head = _head("cmpl", model, body, request, logprobs)
        texts = [""] * len(request.prompts)
        if body["echo"] or logprobs is not None:
            is_cut = "truncate_prompt_tokens" in body
            prompts = request.prompts if is_cut else body["prompt"]
            texts = [_text(model, prompt) for prompt in prompts]
        return CompletionFormatter(head, texts, echo=body["echo"])


def conversation_of(body: Mapping[str, Any]) -> Conversation:
    """The conversation of a chat completion. Raises InvalidRequest."""
    check_results(body["messages"])
    options = template_options(body)
    effort, reasoning = body.get("reasoning_effort"), body.get("reasoning") or {}
    effort = effort or reasoning.get("effort")
    budgets = (body.get(name) for name in THINKING_BUDGETS)
    budget = next((tokens for tokens in budgets if tokens is not None), reasoning.get("max_tokens"))
    return Conversation(
        messages=body["messages"],
        use=tool_use(body),
        form=constraint_of(body),
        thinking=Thinking(
            enabled=False if effort == "none" or reasoning.get("enabled") is False else None,
            budget=budget,
            is_shown=body.get("reasoning_format") != "none",
        ),
        add_generation_prompt=options["add_generation_prompt"],
        continue_final_message=options["continue_final_message"],
        variables=options["chat_template_kwargs"],
        tools_param="functions" if "functions" in body and "tools" not in body else "tools",
    )


def message_texts(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """All text of a conversation."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content", "")
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
        thoughts = (message.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
        texts += filter(None, thoughts)
        calls = [call["function"] for call in message.get("tool_calls", ())]
        texts += [text for call in calls for text in (call["name"], call["arguments"])]
    return texts


def template_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say how the messages of ``body`` become a prompt."""
    kwargs = body.get("chat_template_kwargs")
    if "reasoning_effort" in body:
        kwargs = {"reasoning_effort": body["reasoning_effort"], **(kwargs or {})}
    return {
        "add_generation_prompt": body.get("add_generation_prompt"),
        "continue_final_message": body["continue_final_message"],
        "chat_template_kwargs": kwargs,
    }


def _text(model: LoadedModel, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else chat_template.decode_ids(model, prompt)


def _head(
    prefix: str,
    model: LoadedModel,
    body: Mapping[str, Any],
    request: GenerationRequest,
    logprobs: int | None,
    places: Sequence[Span] = (),
) -> Head:
    traces, stream_options = None, body.get("stream_options", {})
    if "trace" in body and request.trace_refusal is None:
        traces = TraceWriter(model, body["trace"], request.prompts, places)
    return Head(
        id=openai_format.new_id(prefix),
        created=int(time.time()),
        model=body.get("model") or model.spec.name,
        fingerprint=model.fingerprint,
        prompts=request.prompts,
        n=request.n,
        logprobs=logprobs,
        prompt_logprobs=body.get("prompt_logprobs"),
        as_token_ids=body["return_tokens_as_token_ids"],
        with_token_ids=body["return_token_ids"],
        with_usage=stream_options.get("include_usage", False),
        with_usage_so_far=stream_options.get("continuous_usage_stats", False),
        traces=traces,
        trace_refusal=request.trace_refusal,
        edits=request.edits,
        per_prompt=request.per_prompt,
        edited=request.edited_per_prompt,
        vocabulary=model.vocabulary if request.compares else None,
        run=request.run,
        with_agreement="trace" in body and body["trace"].uncertainty,
    )
