"""Interventions in an answer: from the fields of a request to the edits of each sequence.

Everything that can be wrong is found here, before the first byte; what would change nothing is
left out, so that "off" is off to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from transformers_api.errors import InvalidRequest, ModelNotCapable
from transformers_api.inspection.base import Array, Editable, Part
from transformers_api.inspection.edit_plan import Edit, EditPlan, Range
from transformers_api.serving.inspect.edit_positions import PromptPlaces, resolve
from transformers_api.serving.inspect.edit_request import (
    EditRequest,
    ForceRequest,
    InterveneRequest,
    check_size,
)
from transformers_api.serving.inspect.vector_store import Vector
from transformers_api.serving.swap.loaded_model import LoadedModel

MOST_PLACES = 256  # of all edits, in one step
MOST_DIRECTIONS = 16  # that one edit erases
LIGHT_PLACES = 8  # more count as a whole trace does
WORDS: Mapping[Part, str] = {
    "resid": "residual stream",
    "attn": "output of attention",
    "mlp": "output of an MLP",
    "head": "heads",
    "neuron": "neurons",
}


@dataclass(frozen=True, slots=True)
class PlannedEdits:
    """The edits of a sequence, None where nothing is changed, and what they are in words."""

    plan: EditPlan | None
    described: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of a model that edits need; those that cost something are asked for when needed."""

    editable: Editable
    # Of the embedding and of each layer: the usual length of the stream.
    norms: Callable[[], Sequence[float]]
    # (a prompt; None: the calibration text; places) -> the numbers of each place (n, width).
    numbers: Callable[[str | None, Sequence[tuple[int, Part]]], Sequence[Array]]
    vector: Callable[[str], Vector]  # of the requester; raises NotFound


def plan_edits(
    model: LoadedModel,
    request: InterveneRequest,
    facts: Facts,
    prompts: Sequence[PromptPlaces],
) -> tuple[PlannedEdits, ...]:
    """The edits of each prompt's sequences.

    Raises InvalidRequest and ModelNotCapable, with the field; NotFound for a vector.
    """
    check_size(request)
    edits = [
        _Edit(model, facts, each, f"{request.name}.edits[{i}]")
        if isinstance(each, EditRequest)
        else each
        for i, each in enumerate(request.edits)
    ]
    places = sum(len(edit.layers) for edit in edits if isinstance(edit, _Edit))
    if places > MOST_PLACES:
        raise _refusal(
            f"{request.name} edits {places} places per step (max {MOST_PLACES})", request.name
        )
    return tuple(_planned(edits, prompt) for prompt in prompts)


def _planned(edits: Sequence[_Edit | ForceRequest], prompt: PromptPlaces) -> PlannedEdits:
    made: list[Edit] = []
    described: list[dict[str, Any]] = []
    for edit in edits:
        if isinstance(edit, ForceRequest):
            tokens = {"step": edit.step, "token_ids": list(edit.token_ids)}
            described.append({"do": "force", **tokens, "elided": False})
            continue
        own, words = edit.of(prompt)
        made += own
        described.append(words)
    if not made:
        return PlannedEdits(None, tuple(described))
    plan = EditPlan(edits=tuple(made), identity=_identity(made))
    return PlannedEdits(plan, tuple(described))


def forced_tokens(request: InterveneRequest, vocab_size: int, max_tokens: int) -> dict[int, int]:
    """The output tokens that are forced, by step. Raises InvalidRequest."""
    forced: dict[int, int] = {}
    for number, each in enumerate(request.edits):
        if not isinstance(each, ForceRequest):
            continue
        name = f"{request.name}.edits[{number}]"
        if each.step + len(each.token_ids) > max_tokens:
            raise _refusal(
                f"{name}.step and token_ids go beyond the {max_tokens} tokens that may be written",
                f"{name}.step",
            )
        if max(each.token_ids) >= vocab_size:
            raise _refusal(f"{name}.token_ids must be below {vocab_size}", f"{name}.token_ids")
        forced |= {each.step + at: token for at, token in enumerate(each.token_ids)}
    return forced


def _identity(edits: Sequence[Edit]) -> str:
    digest = hashlib.sha256()
    for edit in edits:
        numbers = (edit.units, edit.by, edit.is_aligned, edit.keeps_norm)
        digest.update(repr((edit.do, edit.part, edit.layer, edit.positions, numbers)).encode())
        if edit.vector is not None:
            digest.update(repr(edit.vector.shape).encode() + edit.vector.tobytes())
    return digest.hexdigest()


def _refusal(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param)


@dataclass
class _Edit:
    """One edit of a request, checked against the model."""

    model: LoadedModel
    facts: Facts
    request: EditRequest
    name: str
    layers: list[int] = field(init=False)
    units: dict[int, tuple[int, ...]] = field(default_factory=dict)
    vectors: dict[int, Array] = field(default_factory=dict)  # by layer

    stored: Vector | None = None

    def __post_init__(self) -> None:
        if isinstance(self.request.vector, str):
            self.stored = self._stored(self.request.vector)
        self.layers = self._layers()
        for layer in self.layers:
            self.units[layer] = self._units(layer)
        self.vectors = self._vectors()

    def of(self, prompt: PromptPlaces) -> tuple[list[Edit], dict[str, Any]]:
        """The edits of each layer, and what they are in words."""
        request = self.request
        positions = resolve(request.at, prompt, f"{self.name}.at")
        made = [] if self._is_nothing else self._aligned(positions, prompt)
        made = [edit for edit in made if edit.positions and not _changes_nothing(edit)]
        described: dict[str, Any] = {"do": request.do, "part": request.part, "layers": self.layers}
        if request.part in ("head", "neuron"):
            described["heads" if request.part == "head" else "neurons"] = list(
                self.units[self.layers[0]]
            )
        described["at"] = [[start, stop] for start, stop in positions]
        return made, {**described, "elided": not made}

    @property
    def _is_nothing(self) -> bool:
        request = self.request
        return (request.do == "add" and request.scale == 0) or (
            request.do == "scale" and request.by == 1
        )

    def _aligned(self, positions: tuple[Range, ...], prompt: PromptPlaces) -> list[Edit]:
        if self.request.do != "ablate" or self.request.source is None:
            return [self._made(layer, positions) for layer in self.layers]
        part = self.request.part
        arrays = self.facts.numbers(self.request.source, [(each, part) for each in self.layers])
        count = len(arrays[0])
        first = prompt.length - count  # both end together
        edits = []
        for layer, numbers in zip(self.layers, arrays, strict=True):
            for start, stop in positions:
                end = prompt.length if stop is None else stop
                if stop is None and start < prompt.length and start < max(first, 0):
                    start = max(first, 0)  # the whole text: as much of it as the other has
                if start < first or end > prompt.length:
                    raise _refusal(
                        f"{self.name}.with: a prompt of {count} tokens has no numbers for all "
                        f"positions [{start}, {end}) of one of {prompt.length}; the two are "
                        "aligned at their ends",
                        f"{self.name}.with",
                    )
                own = numbers[start - first : end - first]
                edits.append(self._made(layer, ((start, end),), self._shaped(layer, own), True))
        return edits

    def _made(
        self,
        layer: int,
        positions: tuple[Range, ...],
        vector: Array | None = None,
        is_aligned: bool = False,
    ) -> Edit:
        request = self.request
        do = request.do
        if do == "ablate":
            do = "scale" if request.instead == "zero" and request.source is None else "set"
        by = request.by if request.by is not None else 0.0
        return Edit(
            do=do,
            part=request.part,
            layer=layer,
            positions=positions,
            units=self.units[layer],
            vector=self.vectors.get(layer) if vector is None else vector,
            by=by if request.do == "scale" else 0.0,
            is_aligned=is_aligned,
            keeps_norm=request.keep_norm,
        )

    # -- layers, heads, neurons

    def _layers(self) -> list[int]:
        request, editable = self.request, self.facts.editable
        last = len(editable.places) - 2
        if request.layers == "all":
            layers = [n for n in range(last + 1) if editable.of(n).can(request.part)]
            if not layers:
                self._check(0)
            stored = self.stored
            return [n for n in layers if stored is None or stored.at(n) is not None]
        first = -1 if request.part == "resid" else 0
        for layer in request.layers:
            if not first <= layer <= last:
                raise _refusal(
                    f"{self.name}.layers must be in [{first}, {last}]", f"{self.name}.layers"
                )
            self._check(layer)
        return list(request.layers)

    def _check(self, layer: int) -> None:
        part, places = self.request.part, self.facts.editable.of(layer)
        if places.can(part):
            return
        param = f"{self.name}.part"
        if part in places.unverified:
            raise ModelNotCapable(
                f'part "{part}" of layer {layer} was not verified at load (off by '
                f"{places.off[part]:.2g}); see GET /inspect/model",
                param=param,
            )
        inspector = self.model.inspector
        assert inspector is not None
        anatomy = inspector.anatomy
        message = (
            f"layer {layer} of model type {anatomy.model_type} has no {WORDS[part]} that can be "
            "addressed"
        )
        if part == "neuron" and anatomy.routing and layer in anatomy.routing.layers:
            message += ': it is a mixture of experts; use part "mlp"'
        raise ModelNotCapable(message, param=param)

    def _units(self, layer: int) -> tuple[int, ...]:
        request, places = self.request, self.facts.editable.of(layer)
        if request.part not in ("head", "neuron"):
            return ()
        name = "heads" if request.part == "head" else "neurons"
        count = places.heads if request.part == "head" else places.neurons
        units = request.heads if request.part == "head" else request.neurons
        if units is None:
            raise _refusal(f"{self.name}.{name} is required for part {request.part}", self.name)
        if units == "all":
            return tuple(range(count))
        if not all(0 <= unit < count for unit in units):
            raise _refusal(f"{self.name}.{name} must be in [0, {count - 1}]", f"{self.name}.{name}")
        return tuple(dict.fromkeys(units))

    # -- vectors

    def _vectors(self) -> dict[int, Array]:
        request = self.request
        if request.do == "ablate" and request.instead == "mean" and request.source is None:
            places = [(layer, request.part) for layer in self.layers]
            means = [numbers.mean(0) for numbers in self.facts.numbers(None, places)]
            pairs = zip(self.layers, means, strict=True)
            return {layer: self._shaped(layer, mean) for layer, mean in pairs}
        if request.vector is None:
            if request.value is None:
                return {}
            number = numpy.array(request.value, numpy.float32)
            return {layer: numpy.full(self._width(layer), number) for layer in self.layers}
        if self.stored is not None:
            return {layer: self._scaled(layer, self._row(layer)) for layer in self.layers}
        vector = request.vector
        assert isinstance(vector, numpy.ndarray)
        if request.do == "erase" and vector.ndim == 2 and len(self.layers) == 1:
            return {self.layers[0]: self._directions(vector)}
        if vector.ndim == 2 and len(vector) != len(self.layers):
            raise _refusal(
                f"{self.name}.vector has {len(vector)} rows for {len(self.layers)} layers",
                f"{self.name}.vector",
            )
        rows = vector if vector.ndim == 2 else [vector] * len(self.layers)
        return {
            layer: self._scaled(layer, row) for layer, row in zip(self.layers, rows, strict=True)
        }

    def _stored(self, name: str) -> Vector:
        vector, model = self.facts.vector(name), self.model.spec.name
        if vector.model not in (None, model) and not self.request.any_model:
            raise _refusal(
                f"vector '{name}' was made for model '{vector.model}'; send \"any_model\": true "
                "to use it all the same",
                f"{self.name}.vector",
            )
        return vector

    def _row(self, layer: int) -> Array:
        """The direction of a stored vector for a layer."""
        assert self.stored is not None
        row = self.stored.at(layer)
        if row is None:
            raise _refusal(
                f"vector '{self.request.vector}' has no direction for layer {layer}; it has "
                f"layers {list(self.stored.layers or ())}",
                f"{self.name}.layers",
            )
        return row

    def _width(self, layer: int) -> int:
        if self.request.part == "head":
            return self.facts.editable.of(layer).head_dim
        if self.request.part == "neuron":
            return len(self.units[layer])
        assert self.model.inspector is not None
        return self.model.inspector.anatomy.hidden_size

    def _scaled(self, layer: int, row: Array) -> Array:
        request, width = self.request, self._width(layer)
        self._check_width(len(row), width)
        length = float(numpy.linalg.norm(row.astype(numpy.float64)))
        if request.do == "erase":
            return self._directions(row[None]) if length else row[None]
        if request.do != "add":
            return row
        if request.units == "norm" and length:
            if request.part not in ("resid", "attn", "mlp"):
                raise _refusal(
                    f'{self.name}.units "norm" is of the residual stream; part {request.part} '
                    "has its own: use raw",
                    f"{self.name}.units",
                )
            row = (row.astype(numpy.float64) / length * self.facts.norms()[layer + 1]).astype(
                numpy.float32
            )
        with numpy.errstate(over="ignore", invalid="ignore"):
            return row * numpy.float32(request.scale)

    def _check_width(self, count: int, width: int) -> None:
        if count == width:
            return
        vector = self.request.vector
        name = f"vector '{vector}'" if isinstance(vector, str) else f"{self.name}.vector"
        what = {"head": "a head", "neuron": "the neurons named"}.get(
            self.request.part, "the model's stream"
        )
        raise _refusal(f"{name} has {count} numbers, {what} {width}", f"{self.name}.vector")

    def _directions(self, vectors: Array) -> Array:
        """Orthonormal rows that span what ``vectors`` (k, width) do."""
        if len(vectors) > MOST_DIRECTIONS:
            raise _refusal(
                f"{self.name}.vector has {len(vectors)} directions (max {MOST_DIRECTIONS})",
                f"{self.name}.vector",
            )
        self._check_width(vectors.shape[1], self._width(self.layers[0]))
        _, sizes, rows = numpy.linalg.svd(vectors.astype(numpy.float64), full_matrices=False)
        rows = rows[sizes > 1e-6 * max(sizes.max(), 1e-30)]
        return numpy.ascontiguousarray(rows, numpy.float32)

    def _shaped(self, layer: int, numbers: Array) -> Array:
        """The numbers (…, width of the module) of the units that are edited."""
        units = list(self.units[layer])
        if self.request.part == "head":
            by_head = numbers.reshape(*numbers.shape[:-1], -1, self._width(layer))
            return numpy.ascontiguousarray(by_head[..., units, :])
        if self.request.part == "neuron":
            return numpy.ascontiguousarray(numbers[..., units])
        return numpy.ascontiguousarray(numbers)


def _changes_nothing(edit: Edit) -> bool:
    is_zero = edit.vector is not None and not edit.vector.any()
    return edit.do in ("add", "erase") and is_zero
