"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, validates_schema

from transformers_api.api.http.field_table import COMPLETIONS, of_route
from transformers_api.api.http.fields import (
    MOST_IDS,
    NOT_GIVEN,
    Boolean,
    Integer,
    Object,
    Text,
    check_ids,
)
from transformers_api.api.http.sampling_schema import (
    MAX_LOGPROBS,
    MAX_N,
    Sampling,
    TokenLimit,
    about,
)
from transformers_api.api.intervene.branch import BranchOptions
from transformers_api.api.intervene.schema import ComparedInterveneOptions
from transformers_api.api.openai.schemas.structured import Structured
from transformers_api.api.trace.schema import TraceOptions

MAX_PROMPTS = 1024
PromptInput = str | list[int]

_TEXT = {"type": "string"}
_TOKEN = {"type": "integer", "minimum": 0}


def _many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


class Prompts(fields.Field[list[PromptInput]]):
    """A text, a list of texts, token ids, or a list of lists of token ids; always a list after."""

    LONGEST = MAX_PROMPTS
    EXPECTED = "must be a string, a list of strings, token ids, or a list of lists of token ids"

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> list[PromptInput]:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise ValidationError(self.EXPECTED)
        if not value:
            raise ValidationError("must not be empty")
        if type(value[0]) is int:
            return [_token_ids(value)]
        if len(value) > self.LONGEST:
            raise ValidationError(f"must have at most {self.LONGEST} items")
        return [self._one(i, item, type(value[0])) for i, item in enumerate(value)]

    def _one(self, index: int, item: Any, kind: type) -> PromptInput:
        if kind not in (str, list) or type(item) is not kind:
            raise ValidationError(self.EXPECTED)
        try:
            return _token_ids(item) if isinstance(item, list) else str(item)
        except ValidationError as error:
            raise ValidationError({index: error.messages}) from None


def _token_ids(value: list[Any]) -> list[int]:
    if not value:
        raise ValidationError("must not be empty")
    check_ids(value)
    return value


class CompletionRequest(Sampling, Structured):
    """Text to be continued."""

    entries = of_route(COMPLETIONS)
    most_items = MOST_IDS
    prompt = Prompts(
        required=True,
        error_messages=NOT_GIVEN,
        **about(
            "A text, a list of texts, token ids, or a list of lists of token ids.",
            oneOf=[_TEXT, _many(_TEXT), _many(_TOKEN), _many(_many(_TOKEN))],
        ),
    )
    max_tokens = TokenLimit(
        0, **about("Default 16; -1: what the context leaves. 0 only with `echo`.")
    )
    add_special_tokens = Boolean(
        load_default=True, **about("Begin a text as the model's texts begin.")
    )
    suffix = Text(
        **about("The text after the answer, for models with [fill-in-the-middle](#infill) tokens.")
    )
    echo = Boolean(load_default=False, **about("Begin the answer with the prompt."))
    logprobs = Integer(
        0, MAX_LOGPROBS, **about("Log probabilities of the tokens and of so many likely others.")
    )
    best_of = Integer(1, MAX_N, **about("Make so many answers and send the `n` likeliest."))
    trace = Object(TraceOptions, **about("What to show of every token; see [traces](#traces)."))
    intervene = Object(
        ComparedInterveneOptions, **about("What to change; see [interventions](#interventions).")
    )
    branch = Object(
        BranchOptions, **about("Leave an answer at one of its tokens; see [branches](#branches).")
    )

    @validates_schema(skip_on_field_errors=True)
    def check(self, data: dict[str, Any], **_: Any) -> None:
        """Rules between fields."""
        scores = data["echo"] or "prompt_logprobs" in data
        if data.get("max_tokens") == 0 and not scores:
            raise ValidationError("must be at least 1 unless 'echo' is true", "max_tokens")
        best_of = data.get("best_of", data["n"])
        if best_of < data["n"]:
            raise ValidationError("must not be smaller than 'n'", "best_of")
        if best_of > data["n"] and data["stream"]:
            raise ValidationError("must equal 'n' in a stream", "best_of")
        if data.get("suffix"):
            check_suffix(data)
        if "stream_options" in data:
            check_stream_options(data)


def check_suffix(data: Mapping[str, Any]) -> None:
    """A prompt with a text behind it is neither cut nor repeated."""
    for name in ("truncate_prompt_tokens", "echo"):
        if data.get(name):
            raise ValidationError("must not be sent with 'suffix'", name)


def check_stream_options(data: Mapping[str, Any]) -> None:
    """``stream_options`` mean something in a stream only."""
    if data.get("stream_options") and not data["stream"]:
        raise ValidationError("is only allowed with 'stream': true", "stream_options")
