"""/inspect/vectors."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields

from transformers_api.api.http.fields import (
    NOT_GIVEN,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    StrictSchema,
    Text,
)
from transformers_api.api.http.sampling_schema import about
from transformers_api.api.inspect.schemas.inspect import places
from transformers_api.api.inspect.schemas.jobs import is_job
from transformers_api.api.openai.schemas.chat import MAX_MESSAGES, Message
from transformers_api.serving.inspect.vector_store import MOST_VECTORS

MOST_PAIRS = 256
_MANY = 1 << 20


class Numbers(fields.Field[Any]):
    """Numbers [C], or rows of them [L, C]; compared with each other when they are an array."""

    def __init__(self, **options: Any) -> None:
        super().__init__(error_messages=NOT_GIVEN, **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> Any:
        if not isinstance(value, list) or not value:
            raise ValidationError("must be a list of numbers, or a list of such lists")
        rows = value if isinstance(value[0], list) else [value]
        for row in rows:
            if not isinstance(row, list) or not set(map(type, row)) <= {int, float}:
                raise ValidationError("must be a list of numbers, or a list of such lists")
        return value


class VectorBody(StrictSchema):
    """A vector as JSON."""

    most_items = _MANY
    vector = Numbers(
        required=True,
        metadata={
            "type": "array",
            "items": {},
            "description": "`[C]`: one for any layer. `[L, C]`: one for each of `layers`.",
        },
    )
    layers = Many(
        Integer(0, 1023),
        shortest=1,
        longest=1024,
        **about("After which layers, from 0. Default, with rows: the first L."),
    )
    model = Text(shortest=1, longest=256, **about("Id of the model that it is for."))


class Side(fields.Field[Any]):
    """A text, or messages."""

    EXPECTED = "must be a text or a list of messages, and not empty"

    def __init__(self, **options: Any) -> None:
        self.messages = Many(Object(Message), shortest=1, longest=MAX_MESSAGES)
        described = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
        described |= options.pop("metadata", {})
        super().__init__(error_messages=NOT_GIVEN, metadata=described, **options)

    def _deserialize(self, value: Any, attr: Any, data: Any, **options: Any) -> Any:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list):
            return self.messages.deserialize(value, attr, data, **options)
        raise ValidationError(self.EXPECTED)


class Pair(StrictSchema):
    """Two texts that differ in what the direction is to be."""

    positive = Side(required=True)
    negative = Side(required=True)


class DerivationRequest(StrictSchema):
    """A direction from pairs of texts."""

    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    pairs = Many(Object(Pair), shortest=2, longest=MOST_PAIRS, required=True)
    at = Text(
        choices=("last", "mean"),
        load_default="last",
        **about("The stream at a text's last token, or the mean over its tokens."),
    )
    method = Text(
        choices=("mean", "pca"),
        load_default="mean",
        **about("The mean of the differences, or their first principal component."),
    )
    layers = places("all", load_default="all", **about("Layers from 0. Default: all."))
    job = is_job()


# Answers. Documentation only.


class StoredVector(StrictSchema):
    """A vector, without its numbers."""

    name = Text()
    model = Text(allow_none=True)
    layers = Many(Integer(0, 1023), longest=1024, allow_none=True, **about("null: any layer."))
    width = Integer(1, _MANY)
    norms = Many(Number(0, 1e44), longest=1024, **about("L2 of each row."))
    bytes = Integer(0, 1 << 40)
    source = Text(choices=("json", "npz", "gguf", "safetensors", "pairs"))
    created = Integer(0, 1 << 40)
    separation = Many(
        Number(0, 1),
        longest=1024,
        **about(
            "Of a derived one, per layer: the chance that a positive text lies further along the "
            "direction than a negative one, each measured without its own pair."
        ),
    )


class VectorWithNumbers(StoredVector):
    """A vector."""

    vector = fields.Raw(**about("`[C]`, or rows `[L, C]`."))


class DerivedVector(StoredVector):
    """A vector from pairs."""

    scales = Many(
        Number(-1e38, 1e38),
        longest=1024,
        **about("Per layer: times the row, it leads from the mean of one side to the other's."),
    )
    best_layers = Many(
        Integer(0, 1023), longest=2, **about("First and last of the run of three that tells best.")
    )
    pairs = Integer(2, MOST_PAIRS)
    tokens = Integer(0, _MANY)


class ListedVector(StoredVector):
    """A vector, beside the others."""

    cosine = AnyObject(**about("With each other one of this width, over the layers of both."))


class VectorList(StrictSchema):
    """The vectors of this key."""

    object = Text(choices=("list",))
    data = Many(Object(ListedVector), longest=MOST_VECTORS)


class VectorDeleted(StrictSchema):
    """The end of a vector."""

    name = Text()
    deleted = Boolean()
