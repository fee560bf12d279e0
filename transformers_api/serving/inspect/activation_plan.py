"""The activations that a trace shows of every token, or that a run keeps: what may be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from transformers_api.errors import AttentionUnavailable, InvalidRequest, ModelNotCapable
from transformers_api.inspection.activations import (
    READ_BY_ATTENTION,
    ActivationPart,
    ActivationSpec,
)
from transformers_api.inspection.base import Anatomy, AttentionMode
from transformers_api.inspection.editable import Editable, Part
from transformers_api.serving.inspect.trace_plan import ActivationRequest, check_layer

NAME = "trace.activations"
MOST_PLACES = 256  # layers of all entries together
WORDS = {
    "resid": "residual stream",
    "attn": "output of attention",
    "mlp": "output of an MLP",
    "head": "heads",
    "neuron": "neurons",
}
# Bytes that JSON has no more of: a number as float16 in base64, a place and a value, all around.
_NUMBER, _PAIR, _AROUND = 8 / 3, 24.0, 160.0


@dataclass(frozen=True, slots=True)
class PlannedActivations:
    """The plan: ``specs`` of every step, ``records`` of every token, and how much that is."""

    specs: tuple[ActivationSpec, ...] = ()
    records: tuple[tuple[int, ActivationPart], ...] = ()
    token_bytes: int = 0  # of the JSON of a token
    record_width: int = 0  # numbers that are recorded of each token


def planned(
    requests: Sequence[ActivationRequest],
    anatomy: Anatomy,
    editable: Callable[[], Editable],
    *,
    stores: bool,
) -> PlannedActivations:
    """The plan of these requests; ``stores``: a run is kept.

    Raises InvalidRequest, ModelNotCapable, AttentionUnavailable, each with its field.
    """
    specs: list[ActivationSpec] = []
    records: dict[tuple[int, ActivationPart], int] = {}
    size = 0.0
    for number, request in enumerate(requests):
        entry = _Entry(request, anatomy, editable, f"{NAME}[{number}]")
        entry.check(stores=stores)
        for layer in entry.layers():
            rows, width, units = entry.shape(layer)
            if stores and entry.can_store(layer):
                records[layer, request.part] = entry.whole_width(layer)
            if request.format == "stored":
                continue
            count = min(request.topk, width) if request.format == "topk" else 0
            specs.append(ActivationSpec(part=request.part, layer=layer, units=units, topk=count))
            size += _AROUND + rows * (count * _PAIR if count else width * _NUMBER)
    specs = list(dict.fromkeys(specs))
    if len(specs) + len(records) > MOST_PLACES:
        raise InvalidRequest(
            f"{NAME} are of {len(specs) + len(records)} places (max {MOST_PLACES})", param=NAME
        )
    return PlannedActivations(tuple(specs), tuple(records), int(size), sum(records.values()))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One request, beside the model."""

    request: ActivationRequest
    anatomy: Anatomy
    editable: Callable[[], Editable]
    name: str

    def check(self, *, stores: bool) -> None:
        """Raise InvalidRequest for fields that do not go together."""
        request, part = self.request, self.request.part
        if request.heads is not None and part not in ("head", *READ_BY_ATTENTION):
            raise self._refusal("heads", "is for parts head, q, k and v")
        if request.neurons is not None and part != "neuron":
            raise self._refusal("neurons", "is for part neuron")
        if request.format == "stored" and not stores:
            raise self._refusal("format", '"stored" needs "store": true')

    def can_store(self, layer: int) -> bool:
        """True where a run keeps it; what attention reads may be shown and no more.

        Raises ModelNotCapable where it must be.
        """
        part, places = self.request.part, self.editable().places
        if part not in READ_BY_ATTENTION or (
            places and self.editable().of(layer).can(cast(Part, part))
        ):
            return True
        if self.request.format == "stored":
            raise ModelNotCapable(
                f"the {part} that layer {layer} of model type {self.anatomy.model_type} reads "
                'cannot be stored; use format "f16"',
                param=f"{self.name}.format",
            )
        return False

    def layers(self) -> list[int]:
        """Those that are asked for, each of which has the part."""
        request, part, last = self.request, self.request.part, self.anatomy.layers - 1
        if request.layers == "all":
            layers = [layer for layer in range(last + 1) if self._has(layer)]
            if not layers:
                self._check(0)
            return layers
        first = -1 if part == "resid" else 0
        for layer in request.layers:
            if not first <= layer <= last:
                raise self._refusal("layers", f"must be in [{first}, {last}]")
            self._check(layer)
        return list(request.layers)

    def shape(self, layer: int) -> tuple[int, int, tuple[int, ...]]:
        """(rows, numbers of each, units) of what is shown of a layer."""
        request, part = self.request, self.request.part
        if part == "neuron":
            count = self.editable().of(layer).neurons
            units = self._units(request.neurons, count, "neurons")
            return 1, len(units) or count, units
        heads = self._heads(layer)
        if not heads:
            return 1, self.anatomy.hidden_size, ()
        units = self._units(request.heads, heads, "heads")
        size = self.anatomy.head_dim
        if part == "head":
            size = self.editable().of(layer).head_dim
        return len(units) or heads, size, units

    def whole_width(self, layer: int) -> int:
        """Numbers of the whole part at one token."""
        places, part = self.editable().of(layer), self.request.part
        if part in READ_BY_ATTENTION:
            heads, size = places.inputs[cast(Part, part)]
            return heads * size
        if part == "head":
            return places.heads * places.head_dim
        return places.neurons if part == "neuron" else self.anatomy.hidden_size

    def _heads(self, layer: int) -> int:
        part = self.request.part
        if part == "head":
            return self.editable().of(layer).heads
        if part not in READ_BY_ATTENTION:
            return 0
        attention = self.anatomy.attention[layer]
        return attention.heads if part == "q" else attention.kv_heads

    def _units(self, requested: tuple[int, ...] | None, count: int, what: str) -> tuple[int, ...]:
        if requested is None:
            return ()
        if not all(0 <= unit < count for unit in requested):
            raise self._refusal(what, f"must be in [0, {count - 1}]")
        return requested

    def _has(self, layer: int) -> bool:
        part = self.request.part
        if part in READ_BY_ATTENTION:
            return self._shows_attention and self.anatomy.attention[layer].available
        places = self.editable().places
        return bool(places) and self.editable().of(layer).can(cast(Part, part))

    @property
    def _shows_attention(self) -> bool:
        return self.anatomy.mode is AttentionMode.TAP and self.anatomy.traces_attention

    def _check(self, layer: int) -> None:
        """Raise for a layer that does not show the part."""
        part, param = self.request.part, f"{self.name}.part"
        if part in READ_BY_ATTENTION:
            check_layer(self.anatomy, layer, f"{self.name}.layers")
            if not self._shows_attention:
                raise AttentionUnavailable(
                    f"model type {self.anatomy.model_type} does not show the {part} that its "
                    f"attention reads (mode {self.anatomy.mode})",
                    param=param,
                )
        elif not self._has(layer):
            raise ModelNotCapable(
                f"layer {layer} of model type {self.anatomy.model_type} has no {WORDS[part]} that "
                "can be addressed; see GET /inspect/model",
                param=param,
            )

    def _refusal(self, field: str, message: str) -> InvalidRequest:
        name = f"{self.name}.{field}"
        return InvalidRequest(f"{name} {message}", param=name)
