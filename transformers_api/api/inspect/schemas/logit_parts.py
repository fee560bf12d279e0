"""POST /inspect/logit_parts."""

from __future__ import annotations

from marshmallow import fields

from transformers_api.api.http.fields import (
    AnyObject,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    Text,
)
from transformers_api.api.http.sampling_schema import about
from transformers_api.api.inspect.schemas.inspect import Either, Inspected, whole

MOST_PARTS = 4096
_MANY = 1 << 20


class LogitPartsRequest(Inspected):
    """The logit to take apart."""

    position = whole(
        load_default=-1, **about("The place of the query that predicts it; negative from the end.")
    )
    token = whole(**about("The token's id. Default: the one that the model likes best."))
    against = Either(
        whole(),
        "mean",
        expected='"mean" or a token id',
        text={"type": "integer"},
        **about("Less the logit of this token, or the mean of all. Default: nothing less."),
    )
    by = Text(
        choices=("layer", "head", "neuron", "source"),
        load_default="layer",
        **about(
            "The parts: attention and MLP of each layer; each head; each neuron; or what each head "
            "read from each token."
        ),
    )
    topk = Integer(
        1,
        MOST_PARTS,
        **about("So many parts, those with the largest shares. Default: 20; by layer all."),
    )


# The answer. Documentation only.


class Share(Schema):
    """One part's share."""

    part = Text(**about("`embed`, `attn`, `mlp`, `head`, `neuron`, `source` or `edit`."))
    of = Text(**about("Of an edit: the part of the layer that it was added to."))
    layer = Integer(-1, _MANY, **about("-1: the embedding."))
    head = Integer(0, _MANY)
    neuron = Integer(0, _MANY)
    position = Integer(0, _MANY, **about("Of a source: the token that was read."))
    token = Text(**about("Of a source."))
    value = Number(-1e9, 1e9)


class SplitLogit(Schema):
    """A logit and its parts: `logit` = parts + `rest` + `constant` + `rounding`."""

    target = AnyObject()
    against = fields.Raw(allow_none=True)
    by = Text(choices=("layer", "head", "neuron", "source"))
    logit = Number(-1e9, 1e9, **about("As the head gives it, less that of `against`."))
    model_logit = Number(-1e9, 1e9, **about("As the model gives it: another one where it caps."))
    parts = Many(Object(Share), longest=MOST_PARTS)
    rest = Number(-1e9, 1e9, **about("The sum of the parts that are not listed."))
    constant = Number(-1e9, 1e9, **about("Biases."))
    rounding = Number(-1e9, 1e9, **about("What the model's stream rounded away."))
    verified_rel = Number(0, 1e9, **about("`rounding` beside the sum of the sizes of all shares."))
    count = Integer(0, 1 << 40, **about("All parts, listed or not."))
    by_token = Many(
        Number(-1e9, 1e9), longest=_MANY, **about("By source: the sum of all heads, per token.")
    )
    note = Text(allow_none=True)
