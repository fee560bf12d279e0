"""The trace of an answer's tokens: what may be asked for, its size, what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers_api.config.settings import Settings
from transformers_api.errors import (
    AttentionUnavailable,
    InspectionDisabled,
    InvalidRequest,
    ModelNotCapable,
)
from transformers_api.inspection.activations import ActivationPart
from transformers_api.inspection.base import Anatomy, LayerAttention, TracePlan
from transformers_api.inspection.logit_share import LogitPartsQuestion
from transformers_api.inspection.probes import Probe
from transformers_api.serving.inspect.stored_maps import FeaturesRequest
from transformers_api.serving.inspect.trace_slots import LIGHT, WHOLE
from transformers_api.serving.inspect.vector_store import Vector
from transformers_api.serving.swap.loaded_model import LoadedModel

AttentionFormat = Literal["f16", "u8", "topk", "json", "json64"]

MAX_LENS_LAYERS = 8  # unless every n-th is asked for
MAX_WHOLE_BYTES = 64 << 20  # of the traces of an answer that is not streamed
# Bytes, none of which a trace has more of.
_CELL = {"f16": 8 / 3, "u8": 4 / 3, "json": 8.0, "json64": 26.0}
_KEY = 16.0  # a position and a weight
_NUMBER = 14.0
_ROW = 48.0  # scale or rest, sink, brackets
_LAYER = 160.0
_TOKEN = 160.0  # id, text, probability
_STEP = 400.0
_ADVICE = {
    "u8": 'use attn "topk", or fewer layers',
    "topk": "use a smaller attn_topk, or fewer layers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRequest:
    """One entry of ``activations``."""

    part: ActivationPart
    layers: tuple[int, ...] | Literal["all"] = "all"
    heads: tuple[int, ...] | None = None  # None: all
    neurons: tuple[int, ...] | None = None
    format: Literal["f16", "topk", "stored"] = "f16"
    topk: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsRequest:
    """The parts of a logit that are shown."""

    by: Literal["layer", "head"] = "layer"
    topk: int = 10
    against: Literal["mean"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LensRequest:
    """Which residual streams to read through the model's own head."""

    layers: tuple[int, ...] | Literal["all"] | int  # a number n: every n-th, and the last
    topk: int = 3  # 1..20
    via: str | None = None  # the name of a lens that they are mapped by before


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """The fields of ``trace`` in a request."""

    layers: tuple[int, ...] | Literal["all"] = ()
    heads: tuple[int, ...] | Literal["mean", "max"] | None = None  # None: all
    attn: AttentionFormat = "f16"
    attn_topk: int = 16  # keys, with "topk"
    topk: int = 5  # likeliest tokens of the model
    sampled_topk: int = 0  # and of what was drawn from
    lens: LensRequest | None = None
    resid_norms: bool = False
    router: bool = False
    probes: tuple[str, ...] = ()  # names of vectors that the stream is measured along
    features: FeaturesRequest | None = None
    activations: tuple[ActivationRequest, ...] = ()
    store: bool = False  # keep the answer as a run
    uncertainty: bool = False
    parts: PartsRequest | None = None
    specials: bool = False  # also of the token that ends the answer
    required: bool = True  # False: where it cannot be had, the answer goes on without it
    meta: bool = False  # a leading event about prompt and model, where there are named events
    layers_name: str = "trace.layers"  # the field that names the layers, for messages


def plan(
    model: LoadedModel,
    trace: TraceRequest,
    settings: Settings,
    *,
    prompt_tokens: int,
    max_tokens: int,
    choices: int = 1,
    whole: bool = False,
) -> TracePlan:
    """Plan what the engine notes, once everything that could be wrong has been checked.

    ``choices`` are traced together; with ``whole`` all their tokens are kept until the end.
    ``prompt_tokens``: of the longest prompt. Raises InspectionDisabled, ModelNotCapable,
    AttentionUnavailable, and InvalidRequest for what is out of range or too large.
    """
    if model.inspector is None:
        if not settings.inspect_enabled:
            raise InspectionDisabled()
        raise ModelNotCapable(f"Model '{model.spec.name}' cannot be inspected", param="trace")
    anatomy = model.inspector.anatomy
    layers = _attention_layers(model, anatomy, trace)
    _check_heads(anatomy, layers, trace)
    _check_layer_count(layers, trace, settings)
    lens_layers = _lens_layers(anatomy, trace)
    _check_capable(anatomy, trace)
    keys = min(prompt_tokens + max_tokens, model.engine.max_model_len)
    size = _Size(anatomy, trace, layers, len(lens_layers), keys, choices)
    size.check(settings.trace_max_bytes_per_token)
    if whole:
        size.check_whole(max_tokens)
    return TracePlan(
        layers=layers,
        heads=trace.heads,
        attn_topk=trace.attn_topk if trace.attn == "topk" else 0,
        topk=trace.topk,
        sampled_topk=trace.sampled_topk,
        lens_layers=lens_layers,
        lens_topk=trace.lens.topk if trace.lens else 0,
        resid_norms=trace.resid_norms,
        router=trace.router,
        bytes=size.bytes,
        uncertainty=trace.uncertainty,
        parts=_parts(anatomy, trace.parts),
    )


def cost(trace: TraceRequest, plan: TracePlan, choices: int) -> int:
    """The eighths of a place that a trace takes: one where it is small, else all.

    Small is what a page shows of every answer: probabilities, candidates and one layer.
    """
    has_more = plan.lens_layers or plan.resid_norms or plan.router or len(plan.layers) > 1
    is_text = bool(plan.layers) and trace.attn in ("json", "json64")
    has_more = has_more or bool(trace.probes or trace.activations or trace.parts)
    has_more = has_more or trace.features is not None
    return WHOLE if has_more or is_text or choices > 1 else LIGHT


def probes_of(
    names: Sequence[str], vector: Callable[[str], Vector], anatomy: Anatomy
) -> tuple[Probe, ...]:
    """The probes of vectors, by their names. Raises NotFound, InvalidRequest."""
    probes = []
    for name in names:
        stored = vector(name)
        if stored.width != anatomy.hidden_size:
            raise InvalidRequest(
                f"vector '{name}' has {stored.width} numbers, the model's stream "
                f"{anatomy.hidden_size}",
                param="trace.probes",
            )
        rows = {layer: stored.at(layer) for layer in range(anatomy.layers)}
        probes.append(Probe(name, {n: row for n, row in rows.items() if row is not None}))
    return tuple(probes)


def check_more(plan: TracePlan, more: int, tokens: int, settings: Settings, *, whole: bool) -> None:
    """Raise InvalidRequest where ``more`` bytes beside those of a plan are too many.

    ``tokens``: that the answer may have, all of which are kept to its end where it is ``whole``.
    """
    size = plan.bytes + more
    if size > settings.trace_max_bytes_per_token:
        raise InvalidRequest(
            f"trace too large: with activations it is about {_megabytes(size)} per token "
            f"(max {settings.trace_max_bytes_per_token} bytes); ask for fewer layers or units, or "
            'format "topk"',
            param="trace.activations",
        )
    if whole and size * tokens > MAX_WHOLE_BYTES:
        raise InvalidRequest(
            "trace too large for an answer in one piece: with activations it is about "
            f"{_megabytes(size)} per token, for up to {tokens} tokens (max {MAX_WHOLE_BYTES} "
            'bytes); use "stream": true or fewer tokens',
            param="trace.activations",
        )


def check_layer(anatomy: Anatomy, layer: int, param: str) -> LayerAttention:
    """The layer whose attention is asked for in the field ``param``.

    Raises InvalidRequest for one that is not there, AttentionUnavailable for one without weights.
    """
    check_any_attention(anatomy, param)
    if not 0 <= layer < anatomy.layers:
        raise InvalidRequest(f"{param} must be in [0, {anatomy.layers - 1}]", param=param)
    attention = anatomy.attention[layer]
    if not attention.available:
        why = (
            f" ({attention.reason})"
            if attention.reason and attention.reason != attention.type
            else ""
        )
        raise AttentionUnavailable(
            f"layer {layer} is {attention.type} and has no attention weights{why}; "
            f"layers with attention: {anatomy.layers_with_attention}",
            param=param,
        )
    return attention


def check_any_attention(anatomy: Anatomy, param: str) -> None:
    """Raise AttentionUnavailable for a model that has no attention in any layer."""
    if not anatomy.layers_with_attention:
        raise AttentionUnavailable(
            f"model type {anatomy.model_type} has no attention weights", param=param
        )


def _attention_layers(model: LoadedModel, anatomy: Anatomy, trace: TraceRequest) -> tuple[int, ...]:
    param = trace.layers_name
    if trace.layers == "all":
        check_any_attention(anatomy, param)
        layers = tuple(anatomy.layers_with_attention)
    else:
        layers = tuple(dict.fromkeys(trace.layers))
        for layer in layers:
            check_layer(anatomy, layer, param)
    if layers and not anatomy.traces_attention:
        raise AttentionUnavailable(
            f"The attention of model '{model.spec.name}' cannot be traced while it writes "
            f"(mode {anatomy.mode}); ask for the answer without {param} and inspect its tokens "
            "afterwards",
            param=param,
        )
    return layers


def _check_heads(anatomy: Anatomy, layers: Sequence[int], trace: TraceRequest) -> None:
    if not isinstance(trace.heads, tuple) or not layers:
        return
    heads = min(anatomy.attention[layer].heads for layer in layers)
    if not all(0 <= head < heads for head in trace.heads):
        raise InvalidRequest(f"trace.heads must be in [0, {heads - 1}]", param="trace.heads")


def _check_layer_count(layers: Sequence[int], trace: TraceRequest, settings: Settings) -> None:
    is_small = trace.attn == "topk" or trace.heads in ("mean", "max")
    if not is_small and len(layers) > settings.trace_max_layers:
        raise InvalidRequest(
            f"trace.layers may name at most {settings.trace_max_layers} layers "
            f'with attn "{trace.attn}"',
            param=trace.layers_name,
        )


def _lens_layers(anatomy: Anatomy, trace: TraceRequest) -> tuple[int, ...]:
    if trace.lens is None:
        return ()
    if not anatomy.lens:
        raise ModelNotCapable(
            f"model type {anatomy.model_type} has no logit lens: its residual stream cannot be "
            "read through its head",
            param="trace.lens",
        )
    layers_asked, param, last = trace.lens.layers, "trace.lens.layers", anatomy.layers - 1
    if isinstance(layers_asked, int):
        return tuple(dict.fromkeys((*range(0, anatomy.layers, layers_asked), last)))
    layers = (
        tuple(range(-1, anatomy.layers))
        if layers_asked == "all"
        else tuple(dict.fromkeys(layers_asked))
    )
    if not all(-1 <= layer <= last for layer in layers):
        raise InvalidRequest(f"{param} must be in [-1, {last}]", param=param)
    if len(layers) > MAX_LENS_LAYERS:
        raise InvalidRequest(
            f'{param} may name at most {MAX_LENS_LAYERS} layers; use "every:N" for more',
            param=param,
        )
    return layers


def _parts(anatomy: Anatomy, parts: PartsRequest | None) -> LogitPartsQuestion | None:
    if parts is None:
        return None
    if not anatomy.lens:
        raise ModelNotCapable(
            f"the residual stream of model type {anatomy.model_type} cannot be read through its "
            "head: a logit has no parts here",
            param="trace.parts",
        )
    return LogitPartsQuestion(position=-1, by=parts.by, against=parts.against)


def _check_capable(anatomy: Anatomy, trace: TraceRequest) -> None:
    kind = anatomy.model_type
    for name in ("probes", "resid_norms", "features"):
        if getattr(trace, name) and anatomy.final_norm is None:
            raise ModelNotCapable(
                f"model type {kind} has no residual stream that can be seen", param=f"trace.{name}"
            )
    if trace.router and anatomy.routing is None:
        raise ModelNotCapable(
            f"model type {kind} has no router: it is no mixture of experts", param="trace.router"
        )


class _Size:
    """The bytes that the trace of one token may come to at the end of the longest answer."""

    def __init__(
        self,
        anatomy: Anatomy,
        trace: TraceRequest,
        layers: Sequence[int],
        lens_layers: int,
        keys: int,
        choices: int,
    ) -> None:
        self.trace = trace
        self.choices = choices
        self.shapes = [_shape(anatomy.attention[layer], trace, keys) for layer in layers]
        tokens = trace.topk * 2 + trace.sampled_topk
        tokens += 0 if trace.features is None else trace.features.topk
        if trace.lens:
            tokens += lens_layers * (trace.lens.topk + 2)
        if trace.parts:
            tokens += trace.parts.topk + 2
        numbers = 5 * trace.uncertainty + anatomy.layers * (
            trace.resid_norms + 2 * len(trace.probes)
        )
        if trace.router and anatomy.routing:
            numbers += len(anatomy.routing.layers) * (2 * anatomy.routing.experts_per_token + 5)
        attention = sum(self._attention(heads, width) for heads, width in self.shapes)
        rest = _STEP + tokens * _TOKEN + numbers * _NUMBER
        self.bytes = int((attention + rest) * choices)

    def check(self, most: int) -> None:
        """Raise InvalidRequest for a trace of more than ``most`` bytes."""
        if self.bytes > most:
            raise InvalidRequest(
                f"trace too large: {self._description()} is about {_megabytes(self.bytes)} "
                f"per token (max {most} bytes); {self._advice()}",
                param="trace",
            )

    def check_whole(self, tokens: int) -> None:
        """Raise InvalidRequest for more than one answer can hold."""
        if self.bytes * tokens > MAX_WHOLE_BYTES:
            raise InvalidRequest(
                f"trace too large for an answer in one piece: {self._description()} is about "
                f"{_megabytes(self.bytes)} per token, for up to {tokens} tokens "
                f'(max {MAX_WHOLE_BYTES} bytes); use "stream": true or fewer tokens',
                param="trace",
            )

    def _attention(self, heads: int, width: int) -> float:
        if self.trace.attn == "topk":
            row = min(self.trace.attn_topk, width) * _KEY
        else:
            row = width * _CELL[self.trace.attn]
        return _LAYER + heads * (row + _ROW)

    def _description(self) -> str:
        if not self.shapes:
            return "it"
        heads = max(heads for heads, _ in self.shapes)
        keys = max(width for _, width in self.shapes)
        answers = f" x {self.choices} answers" if self.choices > 1 else ""
        return (
            f"{heads} heads x {keys} keys x {len(self.shapes)} layers{answers} as {self.trace.attn}"
        )

    def _advice(self) -> str:
        if not self.shapes:
            return "ask for fewer layers of the lens, or a smaller topk"
        return _ADVICE.get(self.trace.attn, 'use attn "topk" or "u8", or fewer layers')


def _shape(layer: LayerAttention, trace: TraceRequest, keys: int) -> tuple[int, int]:
    """(heads, keys) of a layer's row."""
    if isinstance(trace.heads, tuple):
        heads = len(trace.heads)
    else:
        heads = layer.heads if trace.heads is None else 1
    return heads, min(keys, layer.window or keys)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 50_000 else f"{size} bytes"
