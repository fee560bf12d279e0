"""GET /inspect/model and POST /inspect/*."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, validates_schema

from transformers_api.api.http.fields import (
    MAX_TOKEN_ID,
    MOST_IDS,
    NOT_GIVEN,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    Text,
    TokenIds,
    Unsupported,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about
from transformers_api.api.inspect.schemas.inputs import check_one_of
from transformers_api.api.intervene.schema import InterveneOptions
from transformers_api.api.openai.schemas.chat import MAX_MESSAGES, Message
from transformers_api.serving.inspect.picture import LARGEST_CELL

INPUTS = ("messages", "prompt", "token_ids", "completion_id")
MOST_THUMB = 64
MOST_TOPK = 20
_MANY = 1 << 20
_ANY = 2**63  # numbers that are only then compared with what the model has


def whole(**options: Any) -> Integer:
    """A whole number whose range depends on the model."""
    return Integer(-_ANY, _ANY - 1, **options)


class Either(fields.Field[Any]):
    """One of some words, or what another field takes."""

    def __init__(
        self,
        other: fields.Field[Any],
        *words: str,
        expected: str,
        text: dict[str, Any],
        **options: Any,
    ) -> None:
        self.other = other
        self.words = words
        self.expected = expected
        metadata = options.pop("metadata", {})
        alternatives = [{"type": "string", "enum": list(words)}, text]
        super().__init__(
            error_messages=NOT_GIVEN, metadata={**metadata, "oneOf": alternatives}, **options
        )

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any
    ) -> Any:
        if isinstance(value, str):
            if value not in self.words:
                raise ValidationError(f"must be {self.expected}")
            return value
        if isinstance(value, bool) or not isinstance(value, int | list):
            raise ValidationError(f"must be {self.expected}")
        try:
            return self.other.deserialize(value, attr, data, **options)
        except ValidationError:
            raise ValidationError(f"must be {self.expected}") from None


_NUMBER = {"type": "integer"}
_NUMBERS = {"type": "array", "items": {"type": "integer"}}


def places(word: str, **options: Any) -> Either:
    """A list of whole numbers, or the word for all of them."""
    return Either(
        Many(whole(), shortest=1, longest=_MANY),
        word,
        expected=f'"{word}" or a list of integers',
        text=_NUMBERS,
        **options,
    )


class Window(Many):
    """[start, stop): compared with the number of tokens later."""

    def __init__(self, **options: Any) -> None:
        super().__init__(whole(), shortest=2, longest=2, **options)


class Inspected(Schema):
    """The tokens to inspect: exactly one of four inputs."""

    most_items = MOST_IDS
    model = Text(
        shortest=1,
        longest=256,
        **about("Id of a model. Default: the one of the completion, else the server's own."),
    )
    messages = Many(
        Object(Message),
        longest=MAX_MESSAGES,
        **about("A conversation; the answer's beginning is added as for an answer."),
    )
    prompt = Text(**about("A text, as for a completion."))
    token_ids = TokenIds(**about("Tokens of the model."))
    completion_id = Text(
        shortest=1,
        longest=256,
        **about("A recent answer's `id`: exactly the tokens that were read and written."),
    )
    choice = Integer(0, _MANY, load_default=0, **about("Which choice of the completion."))
    intervene: fields.Field[Any] = Object(
        InterveneOptions, **about("What to change; see [interventions](#interventions).")
    )
    how: fields.Field[Any] = Unsupported()

    @validates_schema(skip_on_field_errors=True)
    def check_input(self, data: dict[str, Any], **_: Any) -> None:
        """One of four, and not empty."""
        check_one_of(INPUTS, data)


def how_it_is_read() -> fields.Field[Any]:
    """The field ``how``."""
    return Text(
        choices=("at_once", "as_written"),
        load_default="at_once",
        **about(
            "With `completion_id`: `as_written` gives the very numbers of the stream; `at_once` "
            "reads the text anew, which `differs_up_to` so much."
        ),
    )


class MatrixRequest(Inspected):
    """A matrix of queries and keys, or a part of it."""

    format = Text(
        choices=("json", "f16", "u8"),
        load_default="json",
        **about("How the numbers of a JSON answer are written: 5 decimals, or base64."),
    )
    rows = Window(**about("`[start, stop]` of the queries. Default: all."))
    cols = Window(**about("`[start, stop]` of the keys. Default: all."))
    downsample = Many(
        Integer(1, 1 << 16),
        shortest=2,
        longest=2,
        **about("`[rows, columns]`: not more than these; cells that fall together are reduced."),
    )
    reduce = Text(choices=("max", "mean"), load_default="max", **about("How they are reduced."))
    cell = Integer(
        1, LARGEST_CELL, **about("Of a picture: pixels of a cell. Default: so that it can be seen.")
    )
    labels = Boolean(load_default=True, **about("Of a picture: with the tokens and a scale."))


class RolloutRequest(MatrixRequest):
    """Attention followed through layers."""

    layers = Window(**about("`[first, last]` layer, both taken. Default: all."))
    drop_first = Boolean(
        load_default=False, **about("Read nothing from the first token, where attention rests.")
    )


class FullAttentionRequest(MatrixRequest):
    """One layer's attention."""

    how = how_it_is_read()
    trace_layer = whole(required=True, **about("The layer, from 0."))
    head = Either(
        whole(),
        "mean",
        "max",
        "all",
        expected='an integer, "mean", "max" or "all"',
        text=_NUMBER,
        required=True,
        **about("The head, from 0; or all heads reduced; or all of them, in binary formats."),
    )
    max_new_tokens = Integer(
        0, MAX_TOKENS, load_default=0, **about("Generate so many tokens before, and show them too.")
    )
    seed = Integer(-_ANY, _ANY - 1, load_default=42, **about("Of this generation."))
    temperature = Number(0, 2, load_default=0.0, **about("Of this generation."))
    top_k = Integer(-1, MAX_TOKEN_ID, load_default=0, **about("Of this generation; 0 keeps all."))
    top_p = Number(0, 1, load_default=1.0, **about("Of this generation."))


class TokensRequest(Inspected):
    """Tokens, and how the model foresaw them."""

    how = how_it_is_read()
    logprobs = Boolean(
        load_default=False, **about("Add `surprisal`, `entropy`, `rank` and `topk`.")
    )
    topk = Integer(
        0, MOST_TOPK, load_default=0, **about("Likeliest tokens at each place, with `logprobs`.")
    )


class HeadsRequest(Inspected):
    """Every head at a glance."""

    thumb = Integer(
        0, MOST_THUMB, load_default=0, **about("Width of a small picture of each head; 0 for none.")
    )


class LensRequest(Inspected):
    """The readings of each layer through the model's head."""

    how = how_it_is_read()
    layers = places("all", load_default="all", **about("Layers from 0; -1 is the embedding."))
    positions = places(
        "all", load_default=[-1], **about("Of tokens; negative from the end. Default: the last.")
    )
    via = Text(
        shortest=1, longest=64, **about("Name of a [lens](#inspectlenses); else the head alone.")
    )
    topk = Integer(1, MOST_TOPK, load_default=5, **about("Likeliest tokens in each cell."))
    target = Either(
        whole(),
        "sampled",
        expected='"sampled" or a token id',
        text=_NUMBER,
        load_default="sampled",
        **about("The token that is followed; `sampled` is what the model itself likes best."),
    )


class AttributionRequest(Inspected):
    """Why this token."""

    target_token_id = whole(**about("The token. Default: the one that the model likes best."))
    target_position = whole(
        load_default=-1, **about("The place of the query that predicts it; negative from the end.")
    )
    method = Text(
        choices=("occlusion", "gradient_x_input", "gradient_norm", "integrated_gradients"),
        load_default="occlusion",
    )
    steps = Either(
        whole(),
        "auto",
        expected='"auto" or an integer',
        text=_NUMBER,
        load_default="auto",
        **about("Of integrated gradients, 1 to 128; `auto` doubles them until no score moves."),
    )
    baseline = Text(
        choices=("newline", "mean", "zero"),
        load_default="newline",
        **about(
            "Of integrated gradients: where the path begins. `newline` keeps the first token, "
            "whose score is null, and has a line break for each other."
        ),
    )
    positions = places(
        "all", load_default="all", **about("Of occlusion: the tokens that are taken away by turns.")
    )
    group = Text(
        choices=("token", "word"),
        load_default="token",
        **about("Of occlusion: what is taken away at once; all tokens of a word get its score."),
    )
    screen = Integer(
        0,
        _MANY,
        load_default=0,
        **about("Of occlusion: only so many, those with the largest gradients; 0: all."),
    )
    of = Text(choices=("logprob", "logit"), load_default="logprob", **about("What is explained."))


class HiddenStatesRequest(Inspected):
    """The residual stream."""

    how = how_it_is_read()
    layers = places("all", load_default="all", **about("Layers from 0; -1 is the embedding."))
    positions = places(
        "all", load_default=[-1], **about("Of tokens; negative from the end. Default: the last.")
    )
    stream = Text(choices=("residual",), load_default="residual", **about("After each layer."))
    format = Text(choices=("npz", "json"), load_default="npz", **about("Of the answer."))


# Answers. Documentation only.


class Tokens(Schema):
    """The tokens that were inspected."""

    token_ids = Many(Integer(0, MAX_TOKEN_ID), longest=_MANY)
    tokens = Many(Text(), longest=_MANY)
    tokens_display = Many(Text(), longest=_MANY)


class Matrix(Tokens):
    """Rows are queries, columns are keys."""

    attn = fields.Raw(**about("Lists of numbers, or an envelope with base64."))
    rows = Many(Integer(0, _MANY), longest=2)
    cols = Many(Integer(0, _MANY), longest=2)
    n = Integer(0, _MANY)
    verified = Boolean(**about("Whether these rows were shown to be what the model used."))


class FullAttention(Matrix):
    """One layer's attention."""

    layer = Integer(0, _MANY)
    head = fields.Raw()
    kv_head = Integer(0, _MANY)
    layer_type = Text()
    window = Integer(0, _MANY, allow_none=True)
    sink = fields.Raw(**about("What each query's head left unread, where the model has sinks."))
    state = Text(choices=("exact", "truncated"))


class Rollout(Matrix):
    """Attention followed through the layers."""

    layers = Many(Integer(0, _MANY), longest=2)
    note = Text()


class TokenTable(Tokens):
    """Tokens, and how the model foresaw them."""

    bytes = Many(Many(Integer(0, 255), longest=_MANY), longest=_MANY)
    offsets = Many(Many(Integer(0, _MANY), longest=2), longest=_MANY)
    spans = Many(AnyObject(), longest=_MANY)
    surprisal = Many(
        Number(0, 1e9, allow_none=True), longest=_MANY, **about("Nats; null for the first token.")
    )
    entropy = Many(Number(0, 1e9, allow_none=True), longest=_MANY)
    rank = Many(Integer(0, _MANY, allow_none=True), longest=_MANY)
    topk = Many(Many(AnyObject(), longest=MOST_TOPK, allow_none=True), longest=_MANY)


class HeadTable(Schema):
    """Every head at a glance."""

    n = Integer(0, _MANY)
    layers = Many(AnyObject(), longest=_MANY)
    thumb = AnyObject(**about("An envelope of bytes, layers x heads x size x size."))


class Lens(Schema):
    """The readings of each layer through the model's head."""

    layers = Many(Integer(-1, _MANY), longest=_MANY)
    positions = Many(Integer(0, _MANY), longest=_MANY)
    final_norm = Text()
    exact_final = Boolean()
    cells = Many(Many(AnyObject(), longest=_MANY), longest=_MANY)


class Attributed(Schema):
    """Why this token."""

    method = Text()
    unit = Text(choices=("nats", "logits"))
    target = AnyObject()
    scores = Many(Number(-1e9, 1e9, allow_none=True), longest=_MANY)
    convergence_delta = Number(-1e9, 1e9, allow_none=True)
    steps = Integer(1, _MANY, allow_none=True, **about("Of integrated gradients, that were made."))
    largest_change = Number(
        0, 1e9, allow_none=True, **about("Of a score, when the steps were doubled to these.")
    )
    note = Text(allow_none=True)


class HiddenStates(Schema):
    """The residual stream."""

    layers = Many(Integer(-1, _MANY), longest=_MANY)
    positions = Many(Integer(0, _MANY), longest=_MANY)
    stream = Text(choices=("residual",))
    note = Text()
    states = fields.Raw(**about("Lists of numbers: layers x positions x width."))
