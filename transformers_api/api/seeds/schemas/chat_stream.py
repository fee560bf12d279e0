"""POST /chat/stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, pre_load, validates_schema

from transformers_api.api.http.fields import (
    MAX_TOKEN_ID,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    Text,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about, stop_strings
from transformers_api.api.intervene.branch import BranchOptions
from transformers_api.api.intervene.schema import WritingInterveneOptions
from transformers_api.api.openai.schemas.chat import MAX_MESSAGES
from transformers_api.api.trace.schema import StreamTrace

ANY = 2**63  # numbers that are compared with what the model has


class Turn(Schema):
    """One message."""

    role = Text(choices=("system", "user", "assistant"), required=True)
    content = Text(required=True)


class Turns(Many):
    """A conversation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Object(Turn), longest=MAX_MESSAGES, **options)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if value == []:
            raise ValidationError("must not be empty")
        return super()._deserialize(value, *args, **kwargs)


class ChatStreamRequest(Schema):
    """A conversation to be answered, and what to show of every token."""

    messages = Turns(
        required=True, **about("The conversation: `role` (system, user, assistant), `content`.")
    )
    max_new_tokens = Integer(0, MAX_TOKENS, **about("Default 256, or what the context leaves."))
    temperature = Number(0, 100, **about("Default 0.9. 0 takes the most likely token."))
    top_k = Integer(
        1,
        MAX_TOKEN_ID,
        allow_none=True,
        **about("Default 50. Keep the k likeliest; null keeps all."),
    )
    seed = Integer(-ANY, ANY - 1, **about("Default 42. The same seed gives the same tokens."))
    trace_layer = Integer(
        -ANY,
        ANY - 1,
        **about("The layer whose attention is shown, from 0. Required unless `trace` is given."),
    )
    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    top_p = Number(0, 1, **about("Default 1. The share of probability that is kept."))
    stop = stop_strings()
    trace = Object(StreamTrace, **about("What to show, beyond the one layer."))
    intervene = Object(
        WritingInterveneOptions, **about("What to change; see [interventions](#interventions).")
    )
    branch = Object(
        BranchOptions, **about("Leave an answer at one of its tokens; see [branches](#branches).")
    )

    @pre_load
    def drop_nulls(self, data: Any, **options: Any) -> Any:
        """Null means default; for `top_k` it means no filter."""
        fields = super().drop_nulls(data, **options)
        if isinstance(data, Mapping) and "top_k" in data:
            return {**fields, "top_k": data["top_k"]}
        return fields

    @validates_schema(skip_on_field_errors=True)
    def check(self, data: dict[str, Any], **_: Any) -> None:
        """One of the two ways to say what to show."""
        if "trace_layer" not in data and "trace" not in data:
            raise ValidationError("is required", "trace_layer")


class TraceUsage(Schema):
    """The cost of the traces."""

    bytes = Integer(0, ANY - 1, **about("As they were sent."))
    ms = Number(0, 1e12, **about("To write them."))


class StreamUsage(Schema):
    """Tokens as the model counts them."""

    prompt_tokens = Integer(0, MAX_TOKENS)
    completion_tokens = Integer(0, MAX_TOKENS, **about("The one that ended the answer included."))
    trace = Object(TraceUsage)


class ChatStreamDone(Schema):
    """The last event, `done`."""

    reply = Text(**about("What was generated up to the stop string, without space around it."))
    finish_reason = Text(choices=("stop", "length"))
    completion_id = Text(**about("Names these tokens for `/inspect/*`, for ten minutes."))
    usage = Object(StreamUsage)
