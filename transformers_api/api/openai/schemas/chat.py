"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, post_load, validates_schema

from transformers_api.api.http.field_table import CHAT, of_route
from transformers_api.api.http.fields import (
    NOT_GIVEN,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Object,
    Refusal,
    Schema,
    Text,
    Unsupported,
)
from transformers_api.api.http.sampling_schema import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    Sampling,
    TokenLimit,
    about,
)
from transformers_api.api.intervene.branch import BranchOptions
from transformers_api.api.intervene.schema import ComparedInterveneOptions
from transformers_api.api.openai.schemas.completions import check_stream_options
from transformers_api.api.openai.schemas.structured import Structured, Whatever
from transformers_api.api.trace.schema import TraceOptions

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_TOOL_CALLS = 128
THINKING_BUDGETS = (
    "thinking_budget_tokens",
    "thinking_token_budget",
    "max_thinking_tokens",
    "reasoning_budget",
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


class Content(fields.Field[str | list[Any]]):
    """A text, or a list of text parts."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> str | list[Any]:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValidationError("must be a string or a list of text parts")
        if len(value) > MAX_PARTS:
            raise ValidationError(f"must have at most {MAX_PARTS} parts")
        return [self._part(i, part) for i, part in enumerate(value)]

    @staticmethod
    def _part(index: int, part: Any) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise ValidationError({index: ["must be a part such as {'type': 'text', 'text': …}"]})
        if kind != "text":
            text = Refusal(f"is a part of type '{kind[:32]}'; only 'text' is supported")
            raise ValidationError({index: [text]})
        if not isinstance(part.get("text"), str):
            raise ValidationError({index: {"text": ["must be a string"]}})
        return {"type": "text", "text": part["text"]}


class CalledFunction(Schema):
    """The function of a call, and what it was called with."""

    name = Text(shortest=1, longest=256, required=True)
    arguments = Text(required=True, **about("A JSON object, as text."))


class ToolCall(Schema):
    """A call that the assistant made."""

    id = Text(longest=256)
    type = Text(choices=("function",), load_default="function")
    function = Object(CalledFunction, required=True)


class ToolCalls(Many):
    """Calls of an assistant; right ones are loaded without a schema, for they may be many."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Object(ToolCall), longest=MAX_TOOL_CALLS, **options)

    def _item(self, index: int, item: Any, **kwargs: Any) -> Any:
        call = _right_call(item) if isinstance(item, dict) else None
        return call or super()._item(index, item, **kwargs)


def _right_call(call: dict[str, Any]) -> dict[str, Any] | None:
    """Return what ToolCall makes of it; None where that has something to say about it."""
    identity, function = call.get("id"), call.get("function")
    if call.get("type") not in (None, "function") or not isinstance(function, dict):
        return None
    name, arguments = function.get("name"), function.get("arguments")
    if not (isinstance(name, str) and isinstance(arguments, str) and 1 <= len(name) <= 256):
        return None
    right = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if identity is None:
        return right
    is_right = isinstance(identity, str) and len(identity) <= 256
    return {"id": identity, **right} if is_right else None


class Message(Schema):
    """One turn of a conversation."""

    role = Text(choices=ROLES, required=True)
    content = Content(
        error_messages=NOT_GIVEN,
        **about(
            "A text, or a list of text parts.",
            oneOf=[
                {"type": "string"},
                {"type": "array", "items": {"type": "object"}, "maxItems": MAX_PARTS},
            ],
        ),
    )
    name = Text(longest=256)
    tool_call_id = Text(longest=256)
    tool_calls = ToolCalls(**about("Of an earlier answer; the model's template shows them."))
    function_call = Object(CalledFunction, **about("The older form of `tool_calls`."))
    reasoning_content = Text(**about("What was thought before an earlier answer."))
    reasoning = Text(**about("The same."))
    thinking = Text(**about("The same."))
    audio = Unsupported()

    @validates_schema(skip_on_field_errors=True)
    def check(self, data: dict[str, Any], **_: Any) -> None:
        """Only an assistant may have said nothing."""
        if "content" not in data and data["role"] != "assistant":
            raise ValidationError("is required", "content")
        if data.get("tool_calls") and data["role"] != "assistant":
            raise ValidationError("is only allowed in assistant messages", "tool_calls")
        if data["role"] == "tool" and "tool_call_id" not in data:
            raise ValidationError("is required in tool messages", "tool_call_id")
        if data["role"] == "function" and "name" not in data:
            raise ValidationError("is required in function messages", "name")

    @post_load
    def modernise(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The older fields in the words of tools: a result is of the call of its function."""
        if data["role"] == "function":
            data |= {"role": "tool", "tool_call_id": f"call_{data.pop('name')}"}
        if function := data.pop("function_call", None):
            call = {"id": f"call_{function['name']}", "type": "function", "function": function}
            data.setdefault("tool_calls", [call])
        return data


class TemplateFields(Schema):
    """The way from messages to a prompt."""

    add_generation_prompt = Boolean(
        **about("End the prompt where the assistant's turn begins. Default true.")
    )
    continue_final_message = Boolean(
        load_default=False, **about("Continue the last message instead of beginning a new one.")
    )
    chat_template_kwargs = AnyObject(**about("Variables for the model's chat template."))

    @validates_schema(skip_on_field_errors=True)
    def check_template(self, data: dict[str, Any], **_: Any) -> None:
        """Rules between these fields."""
        if data["continue_final_message"] and data.get("add_generation_prompt"):
            raise ValidationError(
                "must not be true together with 'add_generation_prompt'", "continue_final_message"
            )


def conversation(**options: Any) -> Many:
    """A field with a conversation."""
    return Many(Object(Message), shortest=1, longest=MAX_MESSAGES, **options)


class ThinkingBudget(Integer):
    """Tokens of thinking; -1 has no bound."""

    def __init__(self, **options: Any) -> None:
        super().__init__(-1, MAX_TOKENS, **options)

    def deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """See fields.Field."""
        tokens = super().deserialize(value, *args, **kwargs)
        return None if tokens == -1 else tokens


class ReasoningOptions(Schema):
    """Thinking, as OpenRouter has it."""

    effort = Text(choices=EFFORTS)
    max_tokens = Integer(0, MAX_TOKENS)
    enabled = Boolean()
    excluded = Boolean(data_key="exclude", **about("Leave out what was thought."))


class ChatRequest(Sampling, Structured, TemplateFields):
    """A conversation to be continued."""

    entries = of_route(CHAT)
    messages = conversation(required=True)
    max_tokens = TokenLimit(1, **about("Default 512, or what the context leaves; -1: all of it."))
    max_completion_tokens = TokenLimit(1, **about("The same; wins over `max_tokens`."))
    logprobs = Boolean(load_default=False, **about("Add the log probability of each token."))
    top_logprobs = Integer(0, MAX_LOGPROBS, **about("Also of so many likely others."))

    trace = Object(TraceOptions, **about("What to show of every token; see [traces](#traces)."))
    intervene = Object(
        ComparedInterveneOptions, **about("What to change; see [interventions](#interventions).")
    )
    branch = Object(
        BranchOptions, **about("Leave an answer at one of its tokens; see [branches](#branches).")
    )
    tools = Many(
        Whatever(),
        longest=128,
        **about("Functions that the answer may call; see [tools](#tools)."),
    )
    tool_choice = Whatever(
        **about("`auto`, `none`, `required`, a function by its name, or allowed tools.")
    )
    parallel_tool_calls = Boolean(
        load_default=True, **about("Whether one answer may have several calls.")
    )
    functions = Many(Whatever(), longest=128, **about("The older form of `tools`."))
    function_call = Whatever(**about("The older form of `tool_choice`."))
    reasoning_effort = Text(
        choices=EFFORTS,
        **about("`none` answers at once; others are for templates that read them."),
    )
    reasoning = Object(ReasoningOptions, **about("OpenRouter's way to say the same."))
    thinking_budget_tokens = ThinkingBudget(**about("After so many tokens a thought is closed."))
    thinking_token_budget = ThinkingBudget(**about("The same (vLLM)."))
    max_thinking_tokens = ThinkingBudget(**about("The same."))
    reasoning_budget = ThinkingBudget(**about("The same (llama.cpp)."))
    include_reasoning = Boolean(**about("`false` leaves out what was thought."))
    reasoning_format = Text(
        choices=("none", "auto", "deepseek"),
        **about("`none` leaves what was thought in the text of the answer."),
    )

    @validates_schema(skip_on_field_errors=True)
    def check(self, data: dict[str, Any], **_: Any) -> None:
        """Rules between fields."""
        if "top_logprobs" in data and not data["logprobs"]:
            raise ValidationError("needs 'logprobs': true", "top_logprobs")
        if "stream_options" in data:
            check_stream_options(data)
