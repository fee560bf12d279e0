"""/inspect/runs."""

from __future__ import annotations

from typing import Any

from marshmallow import fields, validates_schema

from transformers_api.api.http.fields import (
    MOST_IDS,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    OneOrMany,
    StrictSchema,
    Text,
    TokenIds,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about
from transformers_api.api.inspect.schemas.inputs import check_one_of
from transformers_api.api.intervene.schema import InterveneOptions
from transformers_api.api.openai.schemas.chat import MAX_MESSAGES, Message
from transformers_api.api.trace.schema import TraceOptions

INPUTS = ("messages", "prompt", "token_ids")
_MANY = 1 << 30


class RunRequest(StrictSchema):
    """An answer that is to be kept: one of three inputs, how to write on from it, what to note."""

    most_items = MOST_IDS
    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    messages = Many(Object(Message), longest=MAX_MESSAGES, **about("A conversation."))
    prompt = Text(**about("A text, as for a completion."))
    token_ids = TokenIds(**about("Tokens of the model."))
    max_tokens = Integer(1, MAX_TOKENS, load_default=32, **about("So many tokens at most."))
    temperature = Number(0, 100, load_default=0.0, **about("0: always the likeliest token."))
    top_k = Integer(-1, _MANY, load_default=0, **about("0 or -1: all."))
    top_p = Number(0, 1, above=True, load_default=1.0)
    seed = Integer(0, 2**63 - 1, **about("Default: one that is drawn, and kept."))
    stop = OneOrMany(Text(shortest=1, longest=1000), longest=16, load_default=())
    trace = Object(TraceOptions, **about("As for a completion; `store` goes without saying."))
    intervene: fields.Field[Any] = Object(
        InterveneOptions, **about("What to change; see [interventions](#interventions).")
    )

    @validates_schema(skip_on_field_errors=True)
    def check_input(self, data: dict[str, Any], **_: Any) -> None:
        """One of three, and not empty."""
        check_one_of(INPUTS, data)


# Answers. Documentation only.


class StoredRun(StrictSchema):
    """A run, without its steps and numbers."""

    id = Text()
    created = Integer(0, 1 << 40)
    model = Text()
    prompt_tokens = Integer(0, _MANY)
    completion_tokens = Integer(0, _MANY)
    text = Text()
    finish_reason = Text()
    params = AnyObject(**about("Sampling parameters that differ from the defaults, the seed too."))
    intervene = AnyObject(allow_none=True, **about("As the request had it."))
    can_replay = Boolean()
    activations = Many(
        AnyObject(), longest=_MANY, **about("`layer`, `part`, `array`, `dtype`, `factor`, `shape`.")
    )
    bytes = Integer(0, 1 << 40)


class RunList(StrictSchema):
    """The runs of this key, the newest first."""

    object = Text(choices=("list",))
    data = Many(Object(StoredRun), longest=_MANY)


class RunDeleted(StrictSchema):
    """The end of a run."""

    id = Text()
    deleted = Boolean()


class Replayed(StrictSchema):
    """A run beside the same once more."""

    id = Text()
    identical = Boolean()
    same_weights = Boolean(**about("The model's files are those that wrote the run."))
    tokens = Integer(0, _MANY)
    first_difference = AnyObject(
        allow_none=True, **about("`step`, `token_id`, `token`, and `other_id`, `other` this time.")
    )


class ComparedRuns(StrictSchema):
    """Two runs side by side."""

    a = Text()
    b = Text()
    same_model = Boolean()
    same_prompt = Boolean()
    identical = Boolean()
    first_difference = Integer(0, _MANY, allow_none=True, **about("A step."))
    tokens = Many(
        AnyObject(),
        longest=_MANY,
        **about("`step`, `same`, `a`, `b` (each with token, scores, lens depth), `kl_at_least`."),
    )
    activations = Many(
        AnyObject(),
        longest=_MANY,
        **about("`layer`, `part`, `first`, `mean`, `lowest`, `cosine` of each token."),
    )
