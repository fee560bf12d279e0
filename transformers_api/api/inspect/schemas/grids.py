"""POST /inspect/patch and /inspect/ablate."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields

from transformers_api.api.http.fields import (
    AnyObject,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    StrictSchema,
    Text,
)
from transformers_api.api.http.sampling_schema import about
from transformers_api.api.inspect.schemas.inspect import Inspected, places, whole
from transformers_api.api.inspect.schemas.jobs import is_job
from transformers_api.api.inspect.schemas.vectors import Side
from transformers_api.api.intervene.positions import At
from transformers_api.api.intervene.schema import InterveneOptions

METRICS = ("logit_difference", "logprob", "prob")
METHODS = ("exact", "gradient")
MOST_SAMPLES = 100
_MANY = 1 << 20


class NoiseOptions(StrictSchema):
    """The clean prompt with normal noise on the embeddings of some tokens."""

    noise = Number(
        0.0, 1e3, required=True, **about("In standard deviations of the prompt's embeddings.")
    )
    span = At(required=True, **about("Where, as `at` of `intervene`."))
    samples = Integer(1, MOST_SAMPLES, load_default=10, **about("Draws; numbers are their means."))
    seed = Integer(0, (1 << 63) - 1, load_default=0)


class Corrupt(Side):
    """A text, messages, or noise."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.noise = Object(NoiseOptions)
        self.metadata["oneOf"].append({"type": "object"})

    def _deserialize(self, value: Any, attr: Any, data: Any, **options: Any) -> Any:
        if isinstance(value, dict):
            return self.noise.deserialize(value, attr, data, **options)
        try:
            return super()._deserialize(value, attr, data, **options)
        except ValidationError as error:
            if error.messages != [Side.EXPECTED]:
                raise
            raise ValidationError(f'{Side.EXPECTED}; or {{"noise", "span"}}') from None


def method() -> Text:
    """The field of the method."""
    return Text(
        choices=METHODS,
        load_default="exact",
        **about("`gradient`: all cells at once as far as they are linear, from one backward pass."),
    )


def form() -> Text:
    """The field of the answer's form."""
    return Text(
        choices=("json", "npz", "png", "html"),
        **about("Of the answer. Default: what `Accept` says, else `json`."),
    )


class PatchRequest(StrictSchema):
    """Numbers of one prompt in the place of those of another."""

    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    intervene = Object(
        InterveneOptions,
        **about("What to change of both; see [interventions](#interventions)."),
    )
    clean = Side(required=True)
    corrupt = Corrupt(
        required=True,
        **about("As long as the clean one; or noise: `noise`, `span`, `samples`, `seed`."),
    )
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
    method = method()
    format = form()
    job = is_job()


class AblateRequest(Inspected):
    """Each part by turns set to zero."""

    part = Text(choices=("attn", "mlp", "head"), load_default="head", **about("As in `intervene`."))
    layers = places("all", load_default="all", **about("Layers from 0. Default: all."))
    answer = whole(**about("The token's id. Default: the one that the model likes best."))
    against = whole(**about("Of `logit_difference`. Default: nothing less."))
    metric = Text(choices=METRICS, load_default="logprob", **about("Of the last position."))
    method = method()
    format = form()
    job = is_job()


# The answers. Documentation only.


class GridAnswer(Schema):
    """A grid: a row for each layer."""

    part = Text(choices=("resid", "attn", "mlp", "head"))
    metric = Text(choices=METRICS)
    method = Text(choices=METHODS)
    answer = AnyObject()
    against = fields.Raw(allow_none=True)
    layers = Many(Integer(0, _MANY), longest=_MANY)
    positions = Many(Integer(0, _MANY), longest=_MANY, **about("Of the columns, where they are."))
    tokens = Many(Text(), longest=_MANY, **about("At these positions."))
    grid = fields.Raw(
        **about("Numbers for each layer; null where it has no such head, or is not there yet.")
    )
    note = Text(allow_none=True)


class PatchGrid(GridAnswer):
    """The share of the way from the corrupt prompt's metric to the clean one's."""

    clean = Number(-1e9, 1e9)
    corrupt = Number(-1e9, 1e9)


class AblationGrid(GridAnswer):
    """The metric with the part less the metric without it: how much it is needed."""

    plain = Number(-1e9, 1e9)
