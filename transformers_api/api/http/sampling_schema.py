"""The fields that completions and chat completions share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from marshmallow import ValidationError, fields, validates_schema

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
    TokenIds,
)
from transformers_api.api.http.table_schema import TableSchema

MAX_TOKENS = 1 << 24
MAX_BIASES = 300
MAX_N = 128
MAX_BREAKERS = 16
DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's
MAX_LOGPROBS = 20
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def about(description: str, **properties: Any) -> dict[str, Any]:
    """Options of a field that is described in the OpenAPI document."""
    return {"metadata": {"description": description, **properties}}


def stop_strings() -> OneOrMany:
    """The field ``stop``."""
    return OneOrMany(
        Text(shortest=1, longest=256),
        longest=16,
        **about(
            "A string, or up to 16, that end the answer.",
            oneOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        ),
    )


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
    continuous_usage_stats = Boolean(
        **about("With `include_usage`: every chunk has the `usage` so far.")
    )


class TokenLimit(Integer):
    """A number of tokens; -1 for as many as the context leaves."""

    def __init__(self, low: int, **options: Any) -> None:
        super().__init__(low, MAX_TOKENS, **options)
        self.message += ", or -1 for what the context leaves"
        self.validators = [self._within(low)]
        self.metadata = {**self.metadata, "minimum": -1, "maximum": MAX_TOKENS}

    def _within(self, low: int) -> Callable[[int], int]:
        def check(value: int) -> int:
            if value != -1 and not low <= value <= MAX_TOKENS:
                raise ValidationError(self.message)
            return value

        return check


class Truncation(TableSchema):
    """The part of a prompt that is read."""

    truncate_prompt_tokens = TokenLimit(
        1, **about("Read only so many tokens of the prompt; -1: as many as fit.")
    )
    truncation_side = Text(
        choices=("left", "right"),
        **about("The end of the prompt that is cut off. Default: left; of embeddings right."),
    )

    @validates_schema(skip_on_field_errors=True)
    def check_truncation(self, data: dict[str, Any], **_: Any) -> None:
        """Rules between these fields."""
        if "truncation_side" in data and "truncate_prompt_tokens" not in data:
            raise ValidationError("needs 'truncate_prompt_tokens'", "truncation_side")
        for name in ("trace", "intervene", "branch"):
            if "truncate_prompt_tokens" in data and name in data:
                raise ValidationError(f"must not be sent with '{name}'", "truncate_prompt_tokens")


class Sampling(Truncation):
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
    repeat_last_n = Integer(
        -1, MAX_TOKENS, **about("Tokens that `repetition_penalty` looks back at; -1 is all.")
    )
    presence_penalty = Number(-2, 2, **about("Subtracted once from tokens of the answer."))
    frequency_penalty = Number(-2, 2, **about("Subtracted per occurrence in the answer."))
    logit_bias = LogitBias(
        error_messages=NOT_GIVEN, **about("Token id to a number that is added to its logit.")
    )
    allowed_token_ids = TokenIds(shortest=1, **about("Only these tokens may come."))
    top_n_sigma = Number(
        -1,
        1e6,
        **about("Keep logits within so many standard deviations of the largest; 0 keeps all."),
    )
    xtc_probability = Number(
        0, 1, **about("How often all but the least likely of the likely tokens are left out.")
    )
    xtc_threshold = Number(
        0, 1, **about("Likely from this share on. Default 0.1; above 0.5: none.")
    )
    dry_multiplier = Number(
        0,
        100,
        **about("Subtracted from a token that would go on with a repetition; 0 does nothing."),
    )
    dry_base = Number(
        1, 100, **about("Factor for every token by which a repetition is longer. Default 1.75.")
    )
    dry_allowed_length = Integer(
        0, MAX_TOKENS, **about("Repetitions that are shorter cost nothing. Default 2.")
    )
    dry_penalty_last_n = Integer(
        -1, MAX_TOKENS, **about("Tokens in which a repetition is looked for. Default -1: all.")
    )
    dry_sequence_breakers = Many(
        Text(shortest=1, longest=32),
        shortest=1,
        longest=MAX_BREAKERS,
        **about('Texts that no repetition reaches across. Default: line end, `:`, `"`, `*`.'),
    )
    seed = Integer(-(2**63), 2**63 - 1, **about("The same seed gives the same tokens."))
    min_tokens = Integer(0, MAX_TOKENS, **about("Do not stop before so many tokens."))
    stop = stop_strings()
    stop_token_ids = Many(
        Integer(0, MAX_TOKEN_ID), longest=256, **about("Tokens that end the answer.")
    )
    ignore_eos = Boolean(**about("Go on after the model's end-of-sequence token."))
    return_token_ids = Boolean(
        load_default=False, **about("Add `prompt_token_ids` and `token_ids`.")
    )
    include_stop_str_in_output = Boolean(
        load_default=False,
        **about("The answer ends with the stop string, or the stop token's text."),
    )
    return_tokens_as_token_ids = Boolean(
        load_default=False, **about("Name tokens in log probabilities `token_id:7`.")
    )
    prompt_logprobs = Integer(
        0,
        MAX_LOGPROBS,
        **about("Add `prompt_logprobs`: of the prompt's tokens and of so many likely others."),
    )
    user = Text(longest=512, **about("Accepted and not used."))

    @validates_schema(skip_on_field_errors=True)
    def check_prompt_logprobs(self, data: dict[str, Any], **_: Any) -> None:
        """They come with the whole answer only."""
        if "prompt_logprobs" in data and data["stream"]:
            raise ValidationError("is not available in a stream", "prompt_logprobs")
