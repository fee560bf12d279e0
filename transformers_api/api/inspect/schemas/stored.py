"""/inspect/lenses, /inspect/saes and /inspect/calibration."""

from __future__ import annotations

from marshmallow import fields

from transformers_api.api.http.fields import (
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
from transformers_api.serving.inspect.calibration import MOST_TEXTS

_MANY = 1 << 40


class CalibrationBody(StrictSchema):
    """Texts in the place of ours."""

    texts = Many(
        Text(shortest=1, longest=1 << 16),
        shortest=1,
        longest=MOST_TEXTS,
        required=True,
        **about("Each is read on its own: 64 KiB in all, of which 4096 tokens are read."),
    )


# Answers. Documentation only.


class CalibrationTexts(StrictSchema):
    """The texts that usual numbers are measured over."""

    texts = Many(Text(), longest=MOST_TEXTS)
    own = Boolean(**about("They are the server's own."))


class _Stored(StrictSchema):
    name = Text()
    model = Text(**about("The model that it was checked with."))
    width = Integer(1, _MANY)
    bytes = Integer(0, _MANY)
    created = Integer(0, _MANY)
    note = Text(allow_none=True, **about("The reason to doubt that it is for this model."))


class StoredLens(_Stored):
    """A lens without its numbers."""

    kind = Text(choices=("tuned", "jacobian"))
    layers = Many(Integer(-1, _MANY), longest=_MANY, **about("-1: the embedding."))
    kl = Many(
        Number(0, 1e9),
        longest=_MANY,
        **about("Nats from what the lens reads after each layer to what the model says."),
    )
    kl_plain = Many(Number(0, 1e9), longest=_MANY, **about("The same of the head alone."))


class LensList(StrictSchema):
    """The lenses of this key."""

    object = Text()
    data = Many(Object(StoredLens), longest=_MANY)


class StoredSae(_Stored):
    """A sparse autoencoder without its numbers."""

    architecture = Text()
    part = Text()
    layer = Integer(-1, _MANY)
    features = Integer(1, _MANY)
    k = Integer(0, _MANY, **about("Of topk."))
    subtracts_bias = Boolean(**about("The decoder's bias is subtracted before it encodes."))
    normalization = Text()
    source = Text(**about("The kind of the file."))
    explained_variance = Number(-1e9, 1)
    l0 = Number(0, _MANY, **about("Features that are active, per token."))
    dead = Number(0, 1, **about("The share of features that never are."))
    tokens = Integer(0, _MANY, **about("That these figures are over."))


class SaeList(StrictSchema):
    """The autoencoders of this key."""

    object = Text()
    data = Many(Object(StoredSae), longest=_MANY)


class SaeFeature(StrictSchema):
    """One feature."""

    sae = Text()
    id = Integer(0, _MANY)
    density = Number(0, 1, **about("The share of tokens at which it is active."))
    largest = Number(0, 1e30)
    windows = Many(
        AnyObject(), longest=_MANY, **about("Where it is strongest: `tokens`, `values`.")
    )
    raised = Many(
        AnyObject(),
        longest=_MANY,
        **about("Tokens that it makes likelier: `logit` is the change with each unit of it."),
    )
    lowered = Many(AnyObject(), longest=_MANY)
    nearest = Many(AnyObject(), longest=_MANY, **about("The features with the likest direction."))


class Forgotten(StrictSchema):
    """It was forgotten."""

    name = Text()
    deleted = Boolean()


class CalibrationForgotten(StrictSchema):
    """The server's own texts hold again."""

    deleted = fields.Boolean()
