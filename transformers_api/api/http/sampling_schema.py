"""The fields that completions and chat completions share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields

from transformers_api.api.http.fields import (
    MAX_TOKEN_ID,
    NOT_GIVEN,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    OneOrMany,
    Schema,
    Text,
    Unsupported,
)

MAX_TOKENS = 1 << 24
MAX_BIASES = 300
MAX_N = 8
MAX_LOGPROBS = 20
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def about(description: str, **properties: Any) -> dict[str, Any]:
    """Options of a field that is described in the OpenAPI document."""
    return {"metadata": {"description": description, **properties}}


class LogitBias(fields.Dict):
    """An object from token ids (as strings) to numbers; integers afterwards."""

    def __init__(self, **options: Any) -> None:
        super().__init__(keys=fields.String(), values=fields.Float(), **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise ValidationError("must be an object from token ids to numbers from -100 to 100")
        if len(value) > MAX_BIASES:
            raise ValidationError(f"must have at most {MAX_BIASES} entries")
        return {self._id(key): self._bias(key, bias) for key, bias in value.items()}

    @staticmethod
    def _id(key: str) -> int:
        if not _TOKEN_ID.fullmatch(key):
            raise ValidationError("must have token ids as names")
        return int(key)

    @staticmethod
    def _bias(key: str, bias: Any) -> float:
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValidationError(f"must have a number from -100 to 100 for token {key}")
        return float(bias)


class StreamOptions(Schema):
    """The extras of a stream besides its text."""

    include_usage = Boolean(**about("End with a chunk that has `usage` and no choices."))


class Sampling(Schema):
    """The choice of tokens, and when to stop."""

    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    stream = Boolean(load_default=False, **about("Send server-sent events as tokens come."))
    stream_options = Object(StreamOptions)
    n = Integer(1, MAX_N, load_default=1, **about("Answers per prompt."))
    temperature = Number(0, 2, **about("0 takes the most likely token."))
    top_p = Number(0, 1, **about("Nucleus sampling: the share of probability that is kept."))
    top_k = Integer(-1, MAX_TOKEN_ID, **about("Keep the k most likely tokens; 0 or -1 keeps all."))
    min_p = Number(0, 1, **about("Drop tokens less likely than this share of the likeliest."))
    typical_p = Number(0, 1, above=True, **about("Locally typical sampling; 1 keeps all."))
    repetition_penalty = Number(
        0, 10, above=True, **about("Multiplicative, over prompt and answer; 1 does nothing.")
    )
    presence_penalty = Number(-2, 2, **about("Subtracted once from tokens of the answer."))
    frequency_penalty = Number(-2, 2, **about("Subtracted per occurrence in the answer."))
    logit_bias = LogitBias(
        error_messages=NOT_GIVEN, **about("Token id to a number that is added to its logit.")
    )
    seed = Integer(-(2**63), 2**63 - 1, **about("The same seed gives the same tokens."))
    min_tokens = Integer(0, MAX_TOKENS, **about("Do not stop before so many tokens."))
    stop = OneOrMany(
        Text(shortest=1, longest=256),
        longest=16,
        **about(
            "A string, or up to 16, that end the answer.",
            oneOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        ),
    )
    stop_token_ids = Many(
        Integer(0, MAX_TOKEN_ID), longest=256, **about("Tokens that end the answer.")
    )
    ignore_eos = Boolean(**about("Go on after the model's end-of-sequence token."))
    return_token_ids = Boolean(
        load_default=False, **about("Add `prompt_token_ids` and `token_ids`.")
    )
    user = Text(longest=512, **about("Accepted and not used."))

    # Known elsewhere, not here, and the answer would be another one.
    use_beam_search = Unsupported()
    prompt_logprobs = Unsupported()
    truncate_prompt_tokens = Unsupported()
    bad_words = Unsupported()
    include_stop_str_in_output = Unsupported()
    skip_special_tokens = Unsupported(lambda value: value is True)
