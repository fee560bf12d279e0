"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers_api.api.anthropic import input as message_input
from transformers_api.api.anthropic.format import Head, MessageFormatter, new_id
from transformers_api.api.anthropic.schema import (
    CountTokensRequest,
    MessageBody,
    MessageRequest,
    TokenCount,
)
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import MESSAGES
from transformers_api.api.http.error_schemas import MessagesError
from transformers_api.api.http.request_context import Formatter, RequestContext, answer
from transformers_api.api.http.services import services
from transformers_api.api.openai.conversation import Conversation, Thinking
from transformers_api.api.openai.conversation_task import ConversationTask
from transformers_api.errors import InvalidRequest, ThreadUnsupported
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.tools.answer_plan import AnswerPlan

blueprint = Blueprint(
    "messages", __name__, dialect=MESSAGES, description="Anthropic's messages, for agents"
)
EXAMPLE = {
    "messages": [{"role": "user", "content": "Name three colours of the sea."}],
    "max_tokens": 40,
}
_SAMPLING = ("temperature", "top_p", "top_k")
_KINDS = ("enabled", "disabled", "adaptive")


@blueprint.at("/v1/messages", methods=["POST"])
@blueprint.takes(MessageRequest, example=EXAMPLE)
@blueprint.gives(MessageBody)
@blueprint.gives(MessageBody, content_type="text/event-stream")
@blueprint.gives(MessagesError, 400, description="A field is wrong; the message names it")
@blueprint.gives(MessagesError, 404, description="No such model")
@blueprint.gives(MessagesError, 429, description="Too much is waiting; `Retry-After` says how long")
def create_message(body: dict[str, Any]) -> Any:
    """Answer a conversation, with tools and thinking.

    With `stream` the answer comes as events with names, from `message_start` to `message_stop`; an
    error after the first byte is an event `error`.
    """
    conversation = conversation_of(body)
    sampling: dict[str, Any] = {name: body[name] for name in _SAMPLING if name in body}
    stops = body.get("stop_sequences") or []
    if stops:
        sampling["stop"] = stops
    thinking = (body.get("thinking") or {}).get("type")

    def formatter(model: LoadedModel, request: GenerationRequest, plan: AnswerPlan) -> Formatter:
        head = Head(
            id=new_id("msg"),
            model=body.get("model") or model.spec.name,
            prompt=request.prompts[0],
            stop_sequences=frozenset(stops),
            shows_thinking=thinking != "disabled",
        )
        return MessageFormatter(head, plan)

    return answer(
        ConversationTask(
            conversation,
            formatter,
            model_id=body.get("model"),
            is_streamed=body["stream"],
            texts=message_input.texts_of(conversation.messages),
            sampling=sampling,
            most_tokens=body["max_tokens"],
            too_long="prompt is too long: {tokens} tokens > {most} maximum",
        )
    )


@blueprint.at("/v1/messages/count_tokens", methods=["POST"])
@blueprint.takes(CountTokensRequest, example={"messages": EXAMPLE["messages"]})
@blueprint.gives(TokenCount)
@blueprint.gives(MessagesError, 400, description="A field is wrong; the message names it")
def count_message_tokens(body: dict[str, Any]) -> Any:
    """Count the tokens of a conversation, without an answer."""
    conversation = conversation_of(body)
    with RequestContext(services()) as context:
        model = context.text(body.get("model"), is_chat=True)
        return {"input_tokens": len(conversation.encode(model).ids)}


def conversation_of(body: Mapping[str, Any]) -> Conversation:
    """The conversation of a body. Raises InvalidRequest."""
    if body.get("thread") is not None:
        raise ThreadUnsupported(
            "'thread' is not supported: send the whole conversation", param="thread"
        )
    messages = message_input.messages_of(body.get("system"), body["messages"])
    effort = (body.get("output_config") or {}).get("effort")
    goes_on = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    return Conversation(
        messages=messages,
        use=message_input.tools_of(body),
        form=message_input.form_of(body),
        thinking=_thinking(body.get("thinking") or {}),
        continue_final_message=goes_on,
        variables={"reasoning_effort": effort} if isinstance(effort, str) else {},
    )


def _thinking(thinking: Mapping[str, Any]) -> Thinking:
    kind = thinking.get("type", "adaptive")
    if kind not in _KINDS:
        listed = ", ".join(_KINDS)
        raise InvalidRequest(f"'thinking.type' must be one of {listed}", param="thinking.type")
    if kind == "disabled":
        return Thinking(enabled=False)
    budget = thinking.get("budget_tokens")
    if budget is not None and (type(budget) is not int or budget < 0):
        raise InvalidRequest(
            "'thinking.budget_tokens' must be a number of tokens", param="thinking.budget_tokens"
        )
    return Thinking(enabled=True if kind == "enabled" else None, budget=budget)
