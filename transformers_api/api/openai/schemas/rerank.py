"""POST /v1/rerank and /v1/score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, validates_schema

from transformers_api.api.http.fields import (
    NOT_GIVEN,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Object,
    OneOrMany,
    OutsideOnly,
    Schema,
    Text,
    Unsupported,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, TokenLimit, about
from transformers_api.api.openai.schemas.embeddings import EmbeddingUsage

MAX_DOCUMENTS = 256
_STRING = {"type": "string"}
_TEXTS = about(
    "A text, or several.",
    oneOf=[_STRING, {"type": "array", "items": _STRING, "maxItems": MAX_DOCUMENTS}],
)

SCORINGS = ("cosine", "dot", "euclidean", "manhattan", "cross_encoder")


class Document(fields.Field[str]):
    """A text, or an object with one under ``text``."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> str:
        text = value.get("text") if isinstance(value, Mapping) else value
        if not isinstance(text, str):
            raise ValidationError("must be a string, or an object with 'text'")
        if not text:
            raise ValidationError("must not be empty")
        return text


class _Compared(OutsideOnly):
    """A model, and how much of each text it reads."""

    model = Text(
        shortest=1,
        longest=256,
        required=True,
        **about("Id of a cross encoder, or of a model that makes embeddings."),
    )
    truncate_prompt_tokens = TokenLimit(
        1,
        **about(
            "Read only so many tokens of each text, or of a cross encoder's pair; -1: as many as "
            "the model reads."
        ),
    )
    user = Text(longest=512, **about("Accepted and not used."))


class RerankRequest(_Compared):
    """Documents to be sorted by how near they are to a query."""

    query = Text(shortest=1, required=True, **about("What is looked for."))
    documents = Many(
        Document(error_messages=NOT_GIVEN),
        shortest=1,
        longest=MAX_DOCUMENTS,
        required=True,
        **about(
            "Texts, or objects with `text`.",
            items={"oneOf": [{"type": "string"}, {"type": "object"}]},
        ),
    )
    top_n = Integer(1, 1 << 16, **about("Only so many of the nearest. Default: all."))
    return_documents = Boolean(load_default=True, **about("Add the texts to the results."))
    max_tokens_per_doc = Integer(
        1, MAX_TOKENS, **about("Cohere's name for it; at most what the model reads.")
    )
    max_chunks_per_doc = Unsupported(lambda value: value == 1)
    rank_fields = Unsupported(lambda value: value in ([], ["text"]))


class RerankResult(Schema):
    """A document by its place in the request, and its score."""

    index = Integer(0, MAX_DOCUMENTS)
    relevance_score = fields.Float(**about("The cosine, from -1 to 1; or a cross encoder's score."))
    document = AnyObject(**about("Its `text`."))


class RerankAnswer(Schema):
    """The nearest document first."""

    id = Text()
    model = Text()
    results = Many(Object(RerankResult), longest=MAX_DOCUMENTS)
    scoring = Text(choices=SCORINGS, **about("How the scores were made."))
    usage = Object(EmbeddingUsage)


class ScoreRequest(_Compared):
    """Pairs of texts to be compared: one with each of many, or many with as many."""

    text_1 = OneOrMany(Text(shortest=1), longest=MAX_DOCUMENTS, required=True, **_TEXTS)
    text_2 = OneOrMany(Text(shortest=1), longest=MAX_DOCUMENTS, required=True, **_TEXTS)

    @validates_schema(skip_on_field_errors=True)
    def check(self, data: dict[str, Any], **_: Any) -> None:
        """Texts that make pairs."""
        for name in ("text_1", "text_2"):
            if not data[name]:
                raise ValidationError("must not be empty", name)
        if len(data["text_1"]) not in (1, len(data["text_2"])):
            raise ValidationError("must be one text, or as many as 'text_2'", "text_1")


class ScoreAnswer(Schema):
    """A score for each pair, in their order."""

    id = Text()
    object = Text(choices=("list",))
    created = Integer(0, 1 << 40)
    model = Text()
    data = Many(
        AnyObject(**about("`object`: score, `index`, and `score`: as a `relevance_score`.")),
        longest=MAX_DOCUMENTS,
    )
    scoring = Text(choices=SCORINGS, **about("How the scores were made."))
    usage = Object(EmbeddingUsage)
