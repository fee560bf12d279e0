"""The field ``trace`` of completions: what to show of every token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, post_load

from transformers_api.api.http.fields import (
    NOT_GIVEN,
    Boolean,
    Integer,
    Many,
    Object,
    Schema,
    StrictSchema,
    Text,
)
from transformers_api.api.http.sampling_schema import MAX_LOGPROBS, about
from transformers_api.inspection.activations import ACTIVATION_PARTS
from transformers_api.serving.inspect.stored_maps import FeaturesRequest
from transformers_api.serving.inspect.trace_plan import (
    ActivationRequest,
    LensRequest,
    PartsRequest,
    TraceRequest,
)

MAX_NAMED = 4096  # layers or heads
MAX_KEYS = 4096
_EVERY = re.compile(r"every:([1-9][0-9]{0,3})")
_NUMBERS = {"type": "array", "items": {"type": "integer"}, "maxItems": MAX_NAMED}


def _numbers(value: Any, message: str) -> tuple[int, ...]:
    """Check that they are numbers; whether the model has such layers is checked later."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValidationError(message)
    if len(value) > MAX_NAMED:
        raise ValidationError(f"must have at most {MAX_NAMED} items")
    return tuple(dict.fromkeys(value))


class _Named(fields.Field[Any]):
    """A list of numbers, at least ``fewest``, or one of ``words``."""

    def __init__(self, *words: str, description: str, fewest: int = 0, **options: Any) -> None:
        self.words = words
        self.fewest = fewest
        text = " or ".join(f'"{word}"' for word in words)
        self.message = f"must be a list of integers, or {text}"
        shape = [_NUMBERS, {"type": "string", "enum": list(words)}]
        described = about(description, oneOf=shape)
        super().__init__(error_messages=NOT_GIVEN, **described, **options)

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        numbers = _numbers(value, self.message)
        if len(numbers) < self.fewest:
            raise ValidationError("must not be empty")
        return numbers


class _Heads(fields.Field[Any]):
    """A list of numbers that is not empty."""

    def __init__(self, **options: Any) -> None:
        super().__init__(error_messages=NOT_GIVEN, **options)

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Any:
        numbers = _numbers(value, "must be a list of integers")
        if not numbers:
            raise ValidationError("must not be empty")
        return numbers


class _LensLayers(fields.Field[Any]):
    """A list of layers, "all", or "every:N", which becomes N."""

    EXPECTED = 'must be a list of integers, "all" or "every:N"'

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Any:
        if isinstance(value, str):
            every = _EVERY.fullmatch(value)
            if every is None and value != "all":
                raise ValidationError(self.EXPECTED)
            return int(every[1]) if every else value
        return _numbers(value, self.EXPECTED)


class LensOptions(StrictSchema):
    """The logit lens: what each layer would have said."""

    layers = _LensLayers(
        required=True,
        error_messages=NOT_GIVEN,
        **about(
            'Layers from 0, -1 for the embedding; "all"; "every:N" for every N-th and the last.',
            oneOf=[_NUMBERS, {"type": "string", "pattern": "^(all|every:[1-9][0-9]*)$"}],
        ),
    )
    topk = Integer(1, MAX_LOGPROBS, load_default=3, **about("So many tokens of each layer."))
    via = Text(
        shortest=1, longest=64, **about("Name of a [lens](#inspectlenses); else the head alone.")
    )

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> LensRequest:
        """The options as serving takes them."""
        return LensRequest(**data)


class FeatureOptions(StrictSchema):
    """The features of a sparse autoencoder."""

    sae = Text(
        shortest=1, longest=64, required=True, **about("Name of one in [the store](#inspectsaes).")
    )
    topk = Integer(1, 64, load_default=8, **about("So many, the largest first."))

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> FeaturesRequest:
        """The options as serving takes them."""
        return FeaturesRequest(**data)


class ActivationOptions(StrictSchema):
    """A part of some layers."""

    part = Text(
        choices=ACTIVATION_PARTS,
        required=True,
        **about(
            "`resid`: the stream after the layer; `attn`, `mlp`: what they write into it; `head`: "
            "its output before the projection; `neuron`: of the MLP; `q`, `k`, `v`: as attention "
            "reads them."
        ),
    )
    layer = Integer(-(2**63), 2**63 - 1, **about("One layer, from 0; -1 is the embedding."))
    layers = _Named("all", fewest=1, description='Several; "all" that have the part.')
    heads = _Heads(**about("Of head, q, k and v: these, from 0. Default: all.", **_NUMBERS))
    neurons = _Heads(**about("Of neuron: these, from 0. Default: all.", **_NUMBERS))
    format = Text(
        choices=("f16", "topk", "stored"),
        load_default="f16",
        **about("How they are sent: all, the largest, or only kept in the run."),
    )
    topk = Integer(1, MAX_KEYS, load_default=16, **about('With `"format": "topk"`: so many.'))

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> ActivationRequest:
        """The options as serving takes them."""
        if len(names := [name for name in ("layer", "layers") if name in data]) != 1:
            there = " and ".join(names) or "none"
            raise ValidationError(f"needs exactly one of layer, layers; there is {there}")
        layer = data.pop("layer", None)
        return ActivationRequest(**data if layer is None else {**data, "layers": (layer,)})


class PartsOptions(StrictSchema):
    """The parts of each token's logit."""

    by = Text(choices=("layer", "head"), load_default="layer", **about("`head`: attention split."))
    topk = Integer(1, MAX_KEYS, load_default=10, **about("So many parts, the largest."))
    against = Text(choices=("mean",), **about("Less the mean of all logits. Default: nothing."))

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> PartsRequest:
        """The options as serving takes them."""
        return PartsRequest(**data)


class TraceOptions(StrictSchema):
    """The parts to show of every token."""

    layers = _Named(
        "all",
        load_default=(),
        description='Layers whose attention is shown, from 0; "all". Default: none.',
    )
    heads = _Named(
        "mean",
        "max",
        fewest=1,
        description='Heads of these layers, from 0; "mean" or "max" over all. Default: all.',
    )
    attn = Text(
        choices=("f16", "u8", "topk", "json", "json64"),
        load_default="f16",
        **about("How attention is written."),
    )
    attn_topk = Integer(
        1, MAX_KEYS, load_default=16, **about('With `"attn": "topk"`: so many keys per head.')
    )
    topk = Integer(
        0, MAX_LOGPROBS, load_default=5, **about("The model's likeliest tokens at this place.")
    )
    lens = Object(LensOptions, **about("What the layers would have said: `layers`, `topk`."))
    resid_norms = Boolean(
        load_default=False, **about("The length of the residual stream after each layer.")
    )
    probes = Many(
        Text(shortest=1, longest=64),
        shortest=1,
        longest=16,
        load_default=(),
        **about("Names of [vectors](#inspectvectors): how far the stream lies along each."),
    )
    features = Object(
        FeatureOptions, **about("Features of the stream in a sparse autoencoder: `sae`, `topk`.")
    )
    activations = Many(
        Object(ActivationOptions),
        shortest=1,
        longest=64,
        load_default=(),
        **about("Numbers of parts of layers, at the last token that was read."),
    )
    uncertainty = Boolean(
        load_default=False,
        **about("Entropy, varentropy, margin; with `lens` where it settles, and how late."),
    )
    parts = Object(PartsOptions, **about("What each layer or head adds to the token's logit."))
    store = Boolean(
        load_default=False, **about("Keep the answer as a [run](#inspectruns), with all of this.")
    )
    router = Boolean(load_default=False, **about("The experts that were chosen."))
    specials = Boolean(
        load_default=False, **about("Also of the token that ends the answer, which has no text.")
    )

    required = Boolean(
        load_default=True,
        **about("false: where it cannot be noted, the answer goes on without it, at once."),
    )

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> TraceRequest:
        """The options as serving takes them."""
        lists = {
            "probes": tuple(dict.fromkeys(data["probes"])),
            "activations": tuple(data["activations"]),
        }
        return TraceRequest(**data | lists)


class StreamTrace(TraceOptions):
    """The same for /chat/stream, with its own defaults; there is nothing without a trace there."""

    class Meta(Schema.Meta):
        """See marshmallow."""

        exclude = ("required",)

    attn = Text(
        choices=("f16", "u8", "topk", "json", "json64"),
        load_default="json",
        **about("How attention is written."),
    )
    topk = Integer(0, MAX_LOGPROBS, load_default=10, **about("The likeliest tokens at this place."))
    meta = Boolean(
        load_default=False, **about("Begin with an event `meta` about the prompt and the model.")
    )

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> TraceRequest:
        """As many tokens of what was drawn from as of the model's own."""
        probes = tuple(dict.fromkeys(data["probes"]))
        return TraceRequest(**{**data, "probes": probes}, sampled_topk=data["topk"])
