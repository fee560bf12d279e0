"""The numbers of an edit: vectors, directions, means, for each layer and the units that it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from transformers_api.errors import InvalidRequest
from transformers_api.inspection.base import Array
from transformers_api.inspection.editable import INPUTS, Editable, Part
from transformers_api.inspection.sae import FeatureEdit, Sae
from transformers_api.serving.inspect.edit_positions import PromptPlaces
from transformers_api.serving.inspect.edit_request import EditRequest
from transformers_api.serving.inspect.run_file import Run
from transformers_api.serving.inspect.vector_store import Vector
from transformers_api.serving.swap.loaded_model import LoadedModel

MOST_DIRECTIONS = 16  # that one edit erases


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of a model that edits need; those that cost something are asked for when needed."""

    editable: Editable
    # Of the embedding and of each layer: the usual length of the stream.
    norms: Callable[[], Sequence[float]]
    # (a prompt; None: the calibration text; places) -> the numbers of each place (n, width).
    numbers: Callable[[str | None, Sequence[tuple[int, Part]]], Sequence[Array]]
    vector: Callable[[str], Vector]  # of the requester; raises NotFound
    sae: Callable[[str, str], Sae]  # of a name, for a field; raises NotFound, InvalidRequest
    prompt: Callable[[str], PromptPlaces]  # another text
    run: Callable[[str], Run]  # of the requester; raises NotFound


def feature_of(facts: Facts, request: EditRequest, name: str) -> FeatureEdit | None:
    """The feature that an edit is about. Raises InvalidRequest; ``name``: of the field."""
    if request.sae is None:
        return None
    sae = facts.sae(request.sae, f"{name}.sae")
    if request.feature >= sae.features:
        raise refusal(f"{name}.feature must be in [0, {sae.features - 1}]", f"{name}.feature")
    assert request.value is not None
    return FeatureEdit(sae, request.feature, request.value)


def refusal(message: str, param: str) -> InvalidRequest:
    """The error about a field."""
    return InvalidRequest(message, param=param)


@dataclass(frozen=True)
class EditVectors:
    """The numbers of one edit of ``layers``; ``units``: its heads or neurons in each.

    ``stored``: its vector, where that is a name; ``name``: of the field.
    """

    model: LoadedModel
    facts: Facts
    request: EditRequest
    name: str
    layers: Sequence[int]
    units: Mapping[int, tuple[int, ...]]
    stored: Vector | None

    def by_layer(self) -> dict[int, Array]:
        """The numbers of each layer; those of ablate by another prompt are not here.

        Raises InvalidRequest.
        """
        request = self.request
        if request.do == "ablate" and request.instead == "mean" and not request.has_source:
            places = [(layer, request.part) for layer in self.layers]
            means = [numbers.mean(0) for numbers in self.facts.numbers(None, places)]
            pairs = zip(self.layers, means, strict=True)
            return {layer: self.shaped(layer, mean) for layer, mean in pairs}
        if request.vector is None:
            if request.value is None or request.sae is not None:
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
            raise refusal(
                f"{self.name}.vector has {len(vector)} rows for {len(self.layers)} layers",
                f"{self.name}.vector",
            )
        rows = vector if vector.ndim == 2 else [vector] * len(self.layers)
        return {
            layer: self._scaled(layer, row) for layer, row in zip(self.layers, rows, strict=True)
        }

    def _row(self, layer: int) -> Array:
        """The direction of a stored vector for a layer."""
        assert self.stored is not None
        row = self.stored.at(layer)
        if row is None:
            raise refusal(
                f"vector '{self.request.vector}' has no direction for layer {layer}; it has "
                f"layers {list(self.stored.layers or ())}",
                f"{self.name}.layers",
            )
        return row

    def _width(self, layer: int) -> int:
        if self.request.part == "head":
            return self.facts.editable.of(layer).head_dim
        if self.request.part in INPUTS:
            return self.facts.editable.of(layer).inputs[self.request.part][1]
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
                raise refusal(
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
        heads = dict.fromkeys(("head", *INPUTS), "a head")
        what = {**heads, "neuron": "the neurons named"}.get(self.request.part, "the model's stream")
        raise refusal(f"{name} has {count} numbers, {what} {width}", f"{self.name}.vector")

    def _directions(self, vectors: Array) -> Array:
        """Orthonormal rows that span what ``vectors`` (k, width) do."""
        if len(vectors) > MOST_DIRECTIONS:
            raise refusal(
                f"{self.name}.vector has {len(vectors)} directions (max {MOST_DIRECTIONS})",
                f"{self.name}.vector",
            )
        self._check_width(vectors.shape[1], self._width(self.layers[0]))
        _, sizes, rows = numpy.linalg.svd(vectors.astype(numpy.float64), full_matrices=False)
        rows = rows[sizes > 1e-6 * max(sizes.max(), 1e-30)]
        return numpy.ascontiguousarray(rows, numpy.float32)

    def shaped(self, layer: int, numbers: Array) -> Array:
        """The numbers (…, width of the module) of the units that are edited."""
        units = list(self.units[layer])
        if self.request.part == "head" or self.request.part in INPUTS:
            by_head = numbers.reshape(*numbers.shape[:-1], -1, self._width(layer))
            return numpy.ascontiguousarray(by_head[..., units, :])
        if self.request.part == "neuron":
            return numpy.ascontiguousarray(numbers[..., units])
        return numpy.ascontiguousarray(numbers)


def stored_vector(facts: Facts, request: EditRequest, model: str, name: str) -> Vector | None:
    """The vector that a request names, which was made for this model; None: it names none.

    Raises NotFound, InvalidRequest.
    """
    if not isinstance(request.vector, str):
        return None
    vector = facts.vector(request.vector)
    if vector.model not in (None, model) and not request.any_model:
        raise refusal(
            f"vector '{request.vector}' was made for model '{vector.model}'; send "
            '"any_model": true to use it all the same',
            f"{name}.vector",
        )
    return vector
