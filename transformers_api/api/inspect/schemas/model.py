"""The answer of GET /inspect/model."""

from __future__ import annotations

from transformers_api.api.http.fields import (
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    Text,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about

_MANY = 1 << 20


class PlacesOfLayer(Schema):
    """The parts of a layer that `intervene` can change."""

    layer = Integer(-1, _MANY, **about("-1: the embedding."))
    resid = Boolean()
    attn = Boolean()
    mlp = Boolean()
    head = Integer(0, _MANY, **about("So many heads; 0: none can be changed."))
    neuron = Integer(0, _MANY, **about("So many neurons; 0: none can be changed."))
    q = Integer(0, _MANY, **about("So many heads of queries that can be changed."))
    k = Integer(0, _MANY, **about("So many heads of keys."))
    v = Integer(0, _MANY, **about("So many heads of values."))
    weights = Boolean(**about("Attention's, for `block` and `temper`."))
    verified = Number(
        0,
        1e9,
        allow_none=True,
        **about("What an edit is off by beside the same edit of the model's modules, relative."),
    )


class InspectedModel(Schema):
    """The capabilities of a model."""

    id = Text()
    loaded = Boolean(**about("false: with `?load=false`; then only `limits` and `formats` follow."))
    model_type = Text()
    layers = Integer(0, _MANY)
    heads = Integer(0, _MANY)
    kv_heads = Integer(0, _MANY)
    head_dim = Integer(0, _MANY)
    hidden_size = Integer(0, _MANY)
    vocab = Integer(0, _MANY)
    context = Integer(0, MAX_TOKENS)
    dtype = Text()
    attention = AnyObject()
    lens = AnyObject()
    places = Many(Object(PlacesOfLayer), longest=_MANY, **about("What `intervene` can change."))
    neighbours = Text(
        choices=("bit-equal", "as in any company"),
        **about("Of a request whose neighbours in a pass are edited."),
    )
    resid_norm = Many(
        Number(0, 1e30),
        longest=_MANY,
        **about("The median length of the residual stream after each layer, over a text."),
    )
    suggested_layer = Integer(
        0, _MANY, allow_none=True, **about("Worth a first look; null without attention.")
    )
    gradients = Boolean()
    router = AnyObject(allow_none=True)
    limits = AnyObject()
    formats = Many(Text(), longest=_MANY)
