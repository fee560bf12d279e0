"""POST /generate, and the routes under /models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields

from transformers_api.api.http.fields import (
    MAX_TOKEN_ID,
    NOT_GIVEN,
    AnyObject,
    Boolean,
    Integer,
    Number,
    Object,
    OneOrMany,
    OutsideOnly,
    Schema,
    Text,
    Unsupported,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about

MAX_PROMPTS = 1024
_MS = 1e12
_TEXT = {"type": "string", "minLength": 1}


class PromptTexts(fields.Field[str | list[str]]):
    """A text, or a list of texts."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> str | list[str]:
        if isinstance(value, str):
            if not value:
                raise ValidationError("must not be empty")
            return value
        if not isinstance(value, list):
            raise ValidationError("must be a string or a list of strings")
        if not 1 <= len(value) <= MAX_PROMPTS:
            raise ValidationError(f"must have from 1 to {MAX_PROMPTS} prompts")
        for index, text in enumerate(value):
            if not isinstance(text, str) or not text:
                raise ValidationError({index: ["must be a string that is not empty"]})
        return value


class GenerateRequest(OutsideOnly):
    """Text to be continued."""

    prompt = PromptTexts(
        required=True,
        error_messages=NOT_GIVEN,
        **about(
            "A text, or a list of texts that are continued together.",
            oneOf=[
                _TEXT,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TEXT},
            ],
        ),
    )
    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    max_new_tokens = Integer(1, MAX_TOKENS, **about("Default 100, or what the context leaves."))
    max_length = Integer(
        1, MAX_TOKENS, **about("The same: new tokens, without the prompt. `max_new_tokens` wins.")
    )
    temperature = Number(0, 2, **about("Default 0.7. 0 takes the most likely token."))
    top_k = Integer(0, MAX_TOKEN_ID, **about("Default 50. Keep the k likeliest; 0 keeps all."))
    top_p = Number(0, 1, **about("Default 0.95. The share of probability that is kept."))
    word_repetition_penalty = Number(
        0.1,
        2,
        **about("Default 1. Divides the logits of tokens of prompt and answer, whatever the sign."),
    )
    return_full_text = Boolean(
        load_default=True, **about("Begin `generated_text` with the prompt.")
    )
    stream = Boolean(load_default=False, **about("Answer with events, as `/generate/stream`."))
    n = Unsupported(lambda value: value == 1)
    seed = Integer(-(2**63), 2**63 - 1, **about("The same seed gives the same text."))
    stop = OneOrMany(
        Text(shortest=1, longest=256),
        longest=16,
        **about(
            "A string, or up to 16, that end the text.",
            oneOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        ),
    )


class LoadModelRequest(Schema):
    """Which model to load."""

    model_name = Text(shortest=1, longest=256, required=True)
    task = Text(
        choices=("text-generation",),
        load_default="text-generation",
        **about("What it is loaded for."),
    )


class Done(Schema):
    """A report of what was done."""

    message = Text()


class LoadModelAnswer(Done):
    """The model that is in memory now."""

    model_name = Text()
    task = Text()


class Parameters(Schema):
    """The values that were used."""

    max_new_tokens = Integer(1, MAX_TOKENS)
    temperature = Number(0, 2)
    top_k = Integer(0, MAX_TOKEN_ID)
    top_p = Number(0, 1)
    word_repetition_penalty = Number(0.1, 2)


class Timings(Schema):
    """The time each part took, in milliseconds."""

    encode_ms = Number(0, _MS)
    time_to_first_token_ms = Number(0, _MS, **about("From the start to the first piece of text."))
    generation_ms = Number(0, _MS)
    decode_ms = Number(0, _MS, **about("Joining the pieces: they are decoded as they come."))
    total_ms = Number(0, _MS, **about("All of it, without the wait for the model."))
    avg_ms_per_token = Number(0, _MS)
    prompt_tokens = Integer(0, MAX_TOKENS)


def _for_each(one: dict[str, Any], text: str = "") -> fields.Field[Any]:
    shape = [one, {"type": "array", "items": one}]
    return fields.Raw(**about(f"{text}A list for a list of prompts.", oneOf=shape))


class Generated(Schema):
    """A text, continued. For a list of prompts the fields that say so are lists, in its order."""

    generated_text = _for_each({"type": "string"})
    prompt = _for_each({"type": "string"})
    model_used = Text()
    model = Text(**about("The same."))
    tokens_generated = _for_each({"type": "integer", "minimum": 0}, "Without the end token. ")
    finish_reason = _for_each({"type": "string", "enum": ["stop", "length"]})
    generation_time = Number(0, _MS, **about("Seconds, for all prompts together."))
    tokens_per_second = Number(0, _MS, **about("Of all prompts together."))
    parameters = Object(Parameters)
    timings = Object(Timings)


class NativeModel(Schema):
    """A model that may be asked for."""

    name = Text()
    description = Text()
    parameters = Text(allow_none=True, **about("Such as `51M`, or null."))
    loaded = Boolean()
    config = AnyObject(**about("Its shape: what the registry or its files say."))
    servable = Boolean(**about("false: it is listed, and can never be served; else absent."))
    reason = Text(**about("Why it can never be served."))


class NativeModelState(NativeModel):
    """One model, and how far its loading is."""

    state = Text(choices=("not_loaded", "loading", "loaded", "failed"))
    progress = Number(0, 1, **about("Share of the current stage of loading."))
    progress_text = Text(**about("That stage."))
    error = Text(allow_none=True, **about("Why the last load failed, or null."))
