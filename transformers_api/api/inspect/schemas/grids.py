"""POST /inspect/patch and /inspect/ablate."""

from __future__ import annotations

from marshmallow import fields

from transformers_api.api.http.fields import (
    AnyObject,
    Integer,
    Many,
    Number,
    Schema,
    StrictSchema,
    Text,
)
from transformers_api.api.http.sampling_schema import about
from transformers_api.api.inspect.schemas.inspect import Inspected, places, whole
from transformers_api.api.inspect.schemas.vectors import Side

METRICS = ("logit_difference", "logprob", "prob")
_MANY = 1 << 20


class PatchRequest(StrictSchema):
    """Numbers of one prompt in the place of those of another."""

    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    clean = Side(required=True)
    corrupt = Side(required=True)
    part = Text(
        choices=("resid", "attn", "mlp", "head"),
        load_default="resid",
        **about("As in `intervene`. Of heads all positions are patched at once."),
    )
    layers = places("all", load_default="all", **about("Layers from 0. Default: all."))
    positions = places(
        "all", load_default="all", **about("Of tokens; negative from the end. Default: all.")
    )
    answer = whole(**about("The token's id. Default: the clean prompt's likeliest."))
    against = whole(
        **about("Of `logit_difference`. Default: the corrupt prompt's likeliest, if another.")
    )
    metric = Text(
        choices=METRICS, load_default="logit_difference", **about("Of the last position.")
    )


class AblateRequest(Inspected):
    """Each part by turns set to zero."""

    part = Text(choices=("attn", "mlp", "head"), load_default="head", **about("As in `intervene`."))
    layers = places("all", load_default="all", **about("Layers from 0. Default: all."))
    answer = whole(**about("The token's id. Default: the one that the model likes best."))
    against = whole(**about("Of `logit_difference`. Default: nothing less."))
    metric = Text(choices=METRICS, load_default="logprob", **about("Of the last position."))


# The answers. Documentation only.


class GridAnswer(Schema):
    """A grid: a row for each layer."""

    part = Text(choices=("resid", "attn", "mlp", "head"))
    metric = Text(choices=METRICS)
    answer = AnyObject()
    against = fields.Raw(allow_none=True)
    layers = Many(Integer(0, _MANY), longest=_MANY)
    positions = Many(Integer(0, _MANY), longest=_MANY, **about("Of the columns, where they are."))
    tokens = Many(Text(), longest=_MANY, **about("At these positions."))
    grid = fields.Raw(**about("Numbers for each layer; null where it has no such head."))


class PatchGrid(GridAnswer):
    """The share of the way from the corrupt prompt's metric to the clean one's."""

    clean = Number(-1e9, 1e9)
    corrupt = Number(-1e9, 1e9)
    note = Text(allow_none=True)


class AblationGrid(GridAnswer):
    """The metric with the part less the metric without it: how much it is needed."""

    plain = Number(-1e9, 1e9)
