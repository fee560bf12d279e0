"""From a body to the question for an upstream: the fields that go on, and those that cannot.

What only a model's own tokens could answer is refused by name; all else that a client has sent
goes on, and the upstream refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from marshmallow import missing

from transformers_api.api.http.fields import Schema
from transformers_api.api.http.request_context import upstream_refusal
from transformers_api.api.openai import requests
from transformers_api.api.openai.conversation import Conversation
from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.tools.answer_plan import AnswerPlan
from transformers_api.serving.tools.spec import ToolUse
from transformers_api.serving.upstream.spec import Route, UpstreamCall

Json = dict[str, Any]
PLAN = AnswerPlan(style=None, format="upstream")
USUAL_TOKENS = 512  # of an answer, where nobody says how many: for rates only
_NEED_TOKENS = (
    *("return_token_ids", "return_tokens_as_token_ids", "prompt_logprobs", "best_of"),
    *("truncate_prompt_tokens", "truncation_side", "stop_token_ids", "allowed_token_ids"),
    "branch",
)
# Said here in other words, or done here.
_OWN = (
    *("model", "stream", "stream_options", "trace", "functions", "function_call", "echo"),
    *("include_reasoning", "reasoning", "reasoning_format", "add_special_tokens", "user"),
)


def relayed(
    model: LoadedModel,
    body: Mapping[str, Any],
    schema: Schema,
    route: Route,
    settings: Settings,
    *,
    prompts: int = 1,
    fields: Mapping[str, Any] | None = None,
) -> GenerationRequest:
    """The request for what ``body`` asks; ``fields`` replace some of it.

    Raises ModelNotCapable, which names the field.
    """
    sent = _sent(body, schema)
    for name in _NEED_TOKENS:
        if name in sent:
            raise upstream_refusal(model.spec, f"'{name}' needs its tokens", param=name)
    if "intervene" in body:
        reason = "what it does inside is not changed"
        raise upstream_refusal(model.spec, reason, param="intervene")
    effort = (body.get("reasoning") or {}).get("effort")
    passed: Json = {} if effort is None else {"reasoning_effort": effort}
    passed |= requests.registered_options(model)
    passed |= {name: value for name, value in sent.items() if name not in _OWN}
    request = upstream_request(
        passed | dict(fields or {}),
        route,
        settings,
        n=body["n"],
        prompts=prompts,
        is_streamed=body["stream"],
    )
    if "trace" not in body:
        return request
    refusal = upstream_refusal(model.spec, "what it does inside is not shown", param="trace")
    if body["trace"].required:
        raise refusal
    return request.untraced(refusal)


def upstream_request(
    body: Json,
    route: Route,
    settings: Settings,
    *,
    n: int = 1,
    prompts: int = 1,
    is_streamed: bool,
) -> GenerationRequest:
    """The request that sends ``body`` to the upstream's ``route``."""
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    limits = (body.get(name) for name in ("max_completion_tokens", "max_tokens"))
    most = next((limit for limit in limits if limit is not None), USUAL_TOKENS)
    return GenerationRequest(
        [()] * prompts,
        SamplingParams(max_tokens=max(most, 1)),
        n=n,
        quiet_s=settings.keepalive_s if is_streamed else None,
        upstream=UpstreamCall(route=route, body=body),
    )


def conversation_request(
    model: LoadedModel,
    conversation: Conversation,
    settings: Settings,
    *,
    sampling: Mapping[str, Any],
    most_tokens: int | None,
    logprobs: int | None,
    is_streamed: bool,
) -> GenerationRequest:
    """The request for a conversation of a route that has other words for it."""
    body: Json = {**requests.registered_options(model), **sampling}
    body |= {"messages": list(conversation.messages), **tool_fields(conversation.use)}
    if most_tokens is not None:
        body["max_tokens"] = most_tokens
    if conversation.form is not None:
        body["response_format"] = _response_format(model.spec, conversation.form)
    if logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    effort = (conversation.variables or {}).get("reasoning_effort")
    if conversation.thinking.enabled is False:
        effort = "none"
    if effort is not None:
        body["reasoning_effort"] = effort
    if conversation.continue_final_message:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return upstream_request(body, "chat/completions", settings, is_streamed=is_streamed)


def tool_fields(use: ToolUse | None) -> Json:
    """``tools`` and what belongs to them."""
    if use is None:
        return {}
    fields: Json = {"tools": [tool.as_json for tool in use.callable]}
    if use.mode == "required" and len(use.callable) == 1:
        function = {"name": use.callable[0].name}
        fields["tool_choice"] = {"type": "function", "function": function}
    elif use.mode == "required":
        fields["tool_choice"] = "required"
    if not use.parallel:
        fields["parallel_tool_calls"] = False
    return fields


def texts_only(spec: ModelSpec, inputs: Sequence[str | list[int]], param: str = "prompt") -> Any:
    """``inputs`` as an upstream reads them. Raises ModelNotCapable for token ids."""
    if any(not isinstance(text, str) for text in inputs):
        raise upstream_refusal(spec, f"'{param}' has token ids, which it does not take", param)
    return inputs[0] if len(inputs) == 1 else list(inputs)


def _sent(body: Mapping[str, Any], schema: Schema) -> Json:
    """The fields that say something else than nothing would."""
    return {
        name: value
        for name, value in body.items()
        if name not in schema.fields
        or schema.fields[name].load_default in (missing, None)
        or value != schema.fields[name].load_default
    }


def _response_format(spec: ModelSpec, form: ConstraintSpec) -> Json:
    if form.kind != "json_schema":
        raise upstream_refusal(spec, f"'{form.param}' is no JSON schema", param=form.param)
    schema = {"name": "answer", "schema": orjson.loads(form.source), "strict": form.strict}
    return {"type": "json_schema", "json_schema": schema}
