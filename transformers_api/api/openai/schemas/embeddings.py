"""POST /v1/embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError

from transformers_api.api.http.field_table import EMBEDDINGS, of_route
from transformers_api.api.http.fields import (
    MOST_IDS,
    NOT_GIVEN,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Object,
    Schema,
    Text,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, Truncation, about
from transformers_api.api.openai.schemas.completions import PromptInput, Prompts

MAX_INPUTS = 2048
_TEXT = {"type": "string"}
_TOKEN = {"type": "integer", "minimum": 0}


def _many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


class Inputs(Prompts):
    """The prompts of completions, but no empty text."""

    LONGEST = MAX_INPUTS

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any
    ) -> list[PromptInput]:
        inputs = super()._deserialize(value, attr, data, **options)
        for index, text in enumerate(inputs):
            if text == "":
                raise ValidationError(
                    {index: ["must not be empty"]}
                    if isinstance(value, list)
                    else "must not be empty"
                )
        return inputs


class EmbeddingRequest(Truncation):
    """Texts to be made into vectors."""

    entries = of_route(EMBEDDINGS)
    most_items = MOST_IDS
    model = Text(
        shortest=1, longest=256, required=True, **about("Id of a model that makes embeddings.")
    )
    input = Inputs(
        required=True,
        error_messages=NOT_GIVEN,
        **about(
            "A text, a list of texts, token ids of this model, or a list of lists of them; at most "
            f"{MAX_INPUTS} inputs.",
            oneOf=[_TEXT, _many(_TEXT), _many(_TOKEN), _many(_many(_TOKEN))],
        ),
    )
    encoding_format = Text(
        choices=("float", "base64"),
        load_default="float",
        **about("Numbers, or little-endian float32 in base64."),
    )
    dimensions = Integer(
        1, 1 << 16, **about("Only the first so many numbers, scaled to length one again.")
    )
    normalize = Boolean(
        **about("Scale vectors to length one, or do not. Default: as the model's entry says.")
    )
    prompt_name = Text(
        shortest=1, longest=256, **about("The model's prompt of that name stands before each text.")
    )
    input_type = Text(
        shortest=1,
        longest=64,
        **about(
            "The side of a search (`query`, `document`, `passage`): the model's prompt for it, if "
            "it has one. Or another prompt's name."
        ),
    )
    user = Text(longest=512, **about("Accepted and not used."))


class EmbeddingUsage(Schema):
    """Tokens of the model itself."""

    prompt_tokens = Integer(0, MAX_TOKENS)
    total_tokens = Integer(0, MAX_TOKENS)


class Embeddings(Schema):
    """A vector per input, in their order."""

    object = Text(choices=("list",))
    data = Many(
        AnyObject(**about("`object`: embedding, `index`, and `embedding`: numbers or base64.")),
        longest=MAX_INPUTS,
    )
    model = Text()
    usage = Object(EmbeddingUsage)
