"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from transformers_api.api.http.fields import (
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    OutsideOnly,
    Schema,
    Text,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about
from transformers_api.api.openai.schemas.structured import Whatever


class PromptFields(Schema):
    """The conversation, and what may be called."""

    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    messages = Many(
        Whatever(),
        shortest=1,
        longest=4096,
        required=True,
        **about("Turns of `user`, `assistant` and `system`: texts, or blocks."),
    )
    system = Whatever(
        **about(
            "A text, or blocks of text.",
            oneOf=[{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
        )
    )
    tools = Many(Whatever(), longest=128, **about("`name`, `description`, `input_schema`."))
    tool_choice = AnyObject(**about("`auto`, `any`, `tool` with a `name`, or `none`."))
    thinking = AnyObject(**about("`enabled` with `budget_tokens`, `adaptive`, or `disabled`."))
    output_config = AnyObject(**about("`effort`, and `format` with a JSON schema."))
    thread = AnyObject(**about("Refused by name: no conversation is held here."))


class MessageRequest(PromptFields, OutsideOnly):
    """An answer that is asked for."""

    max_tokens = Integer(
        1, MAX_TOKENS, required=True, **about("A ceiling; it is cut to what the context leaves.")
    )
    stream = Boolean(load_default=False, **about("Send server-sent events as tokens come."))
    stop_sequences = Many(
        Text(shortest=1, longest=256), longest=16, **about("Texts that end the answer.")
    )
    temperature = Number(0, 1, **about("0 takes the most likely token."))
    top_p = Number(0, 1, **about("Nucleus sampling: the share of probability that is kept."))
    top_k = Integer(-1, (1 << 31) - 1, **about("Keep the k most likely tokens."))
    metadata = AnyObject(**about("Not used."))


class CountTokensRequest(PromptFields):
    """A conversation whose tokens are to be counted."""


class MessageBody(Schema):
    """An answer."""

    id = Text()
    type = Text(choices=("message",))
    role = Text(choices=("assistant",))
    model = Text()
    content = Many(AnyObject(), longest=1 << 20, **about("`thinking`, `text`, `tool_use`."))
    stop_reason = Text(allow_none=True)
    stop_sequence = Text(allow_none=True)
    usage = AnyObject()


class TokenCount(Schema):
    """The size of a prompt."""

    input_tokens = Integer(0, MAX_TOKENS)
