"""One edit of a request, checked against the model: its layers, its units, its positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers_api.errors import InvalidRequest, ModelNotCapable
from transformers_api.inspection.base import Array
from transformers_api.inspection.edit_plan import Edit, Range
from transformers_api.inspection.editable import INPUTS, Part
from transformers_api.inspection.sae import FeatureEdit
from transformers_api.serving.inspect.edit_positions import (
    PromptPlaces,
    joined,
    resolve,
    single_positions,
)
from transformers_api.serving.inspect.edit_request import EditRequest
from transformers_api.serving.inspect.edit_vectors import (
    EditVectors,
    Facts,
    feature_of,
    refusal,
    stored_vector,
)
from transformers_api.serving.inspect.vector_store import Vector
from transformers_api.serving.swap.loaded_model import LoadedModel

WORDS: Mapping[Part, str] = {
    "resid": "residual stream",
    "attn": "output of attention",
    "mlp": "output of an MLP",
    "head": "heads",
    "neuron": "neurons",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "weights": "attention weights",
}


@dataclass
class ModelEdit:
    """One edit of a request, checked against the model."""

    model: LoadedModel
    facts: Facts
    request: EditRequest
    name: str
    layers: list[int] = field(init=False)
    units: dict[int, tuple[int, ...]] = field(default_factory=dict)
    vectors: dict[int, Array] = field(default_factory=dict)  # by layer
    stored: Vector | None = None

    feature: FeatureEdit | None = None

    def __post_init__(self) -> None:
        self.feature = feature_of(self.facts, self.request, self.name)
        if self.feature is not None:
            sae = self.feature.sae
            self.request = replace(self.request, part=sae.part, layers=(sae.layer,))
        own = self.model, self.facts, self.request
        self.stored = stored_vector(self.facts, self.request, self.model.spec.name, self.name)
        self.layers = self._layers()
        for layer in self.layers:
            self.units[layer] = self._units(layer)
        self._numbers = EditVectors(*own, self.name, self.layers, self.units, self.stored)
        self.vectors = self._numbers.by_layer()

    def of(self, prompt: PromptPlaces) -> tuple[list[Edit], dict[str, Any]]:
        """The edits of each layer, and what they are in words."""
        request = self.request
        if request.part == "weights":
            return self._of_weights(prompt)
        if request.do == "patch":
            return self._of_patch(prompt)
        positions = resolve(request.at, prompt, f"{self.name}.at")
        made = [] if self._is_nothing else self._aligned(positions, prompt)
        made = [edit for edit in made if edit.positions and not _changes_nothing(edit)]
        at = [[start, stop] for start, stop in positions]
        return made, {**self._words(), "at": at, "elided": not made}

    def _words(self) -> dict[str, Any]:
        request = self.request
        words: dict[str, Any] = {"do": request.do, "part": request.part, "layers": self.layers}
        if units := self.units[self.layers[0]]:
            words["neurons" if request.part == "neuron" else "heads"] = list(units)
        if self.feature is not None:
            words |= {"sae": request.sae, "feature": request.feature, "value": request.value}
        return words

    def _of_patch(self, prompt: PromptPlaces) -> tuple[list[Edit], dict[str, Any]]:
        request, name = self.request, f"{self.name}.from.at"
        source = self._source()
        at = single_positions(request.at, prompt, f"{self.name}.at")
        source_at = request.at if request.source_at is None else request.source_at
        origins = single_positions(source_at, source, name)
        if len(at) != len(origins):
            raise refusal(f"{name} has {len(origins)} positions for {len(at)} of at", name)
        pairs = sorted(zip(at, origins, strict=True))
        ranges = joined([place for place, _ in pairs])
        rows = [origin for _, origin in pairs]
        made = [
            self._made(layer, ranges, self._numbers.shaped(layer, numbers[rows]), True)
            for layer, numbers in (self._source_numbers().items() if at else ())
        ]
        words = {"at": list(at), "from": {"at": list(origins)}}
        return made, {**self._words(), **words, "elided": not made}

    def _source(self) -> PromptPlaces:
        """The text that numbers are from."""
        request = self.request
        if request.run is None:
            assert request.source is not None
            return self.facts.prompt(request.source)
        run = self.facts.run(request.run)
        if run.model != self.model.spec.name and not request.any_model:
            raise refusal(
                f"run '{run.id}' is of model '{run.model}'; send \"any_model\": true to use it all "
                "the same",
                f"{self.name}.{self._source_field}",
            )
        ids = [*run.prompt_ids, *run.token_ids[:-1]]
        return PromptPlaces(
            ids=ids,
            most=len(ids),
            vocabulary=self.model.vocabulary,
            spans=tuple,
            prompt_tokens=len(run.prompt_ids),
        )

    def _source_numbers(self) -> dict[int, Any]:
        """The numbers (n, width) of that text, by layer."""
        part = self.request.part
        if self.request.run is None:
            places = [(layer, part) for layer in self.layers]
            return dict(
                zip(self.layers, self.facts.numbers(self.request.source, places), strict=True)
            )
        assert part != "weights"
        run, arrays = self.facts.run(self.request.run), {}
        for layer in self.layers:
            try:
                arrays[layer] = run.numbers(layer, part)
            except InvalidRequest as error:
                raise refusal(error.message, f"{self.name}.{self._source_field}") from None
        return arrays

    @property
    def _source_field(self) -> str:
        return "from" if self.request.do == "patch" else "with"

    def _of_weights(self, prompt: PromptPlaces) -> tuple[list[Edit], dict[str, Any]]:
        request = self.request
        is_block = request.do == "block"
        name = "queries" if is_block else "at"
        queries = resolve(
            request.queries if is_block else request.at, prompt, f"{self.name}.{name}"
        )
        keys = resolve(request.keys, prompt, f"{self.name}.keys")
        # No token reads from one behind it.
        last = max((prompt.most if stop is None else stop for _, stop in queries), default=0)
        is_nothing = (
            not any(start < last for start, _ in keys) if is_block else request.temperature == 1
        )
        made = [
            Edit(
                do="block" if is_block else "temper",
                part="weights",
                layer=layer,
                positions=queries,
                units=self.units[layer],
                keys=keys,
                by=request.temperature,
            )
            for layer in ([] if is_nothing or not queries else self.layers)
        ]
        described = {
            "do": request.do,
            "layers": self.layers,
            "heads": list(self.units[self.layers[0]]),
            name: [[start, stop] for start, stop in queries],
        }
        if is_block:
            described["keys"] = [[start, stop] for start, stop in keys]
        return made, {**described, "elided": not made}

    @property
    def _is_nothing(self) -> bool:
        request = self.request
        return (request.do == "add" and request.scale == 0) or (
            request.do == "scale" and request.by == 1
        )

    def _aligned(self, positions: tuple[Range, ...], prompt: PromptPlaces) -> list[Edit]:
        if self.request.do != "ablate" or not self.request.has_source:
            return [self._made(layer, positions) for layer in self.layers]
        source = self._source()
        first = prompt.length - source.length  # both prompts end together
        last = first + len(source.ids)
        edits = []
        for layer, numbers in self._source_numbers().items():
            for start, stop in positions:
                end = last if stop is None else stop
                if stop is None and start < prompt.length and start < max(first, 0):
                    start = max(first, 0)  # the whole text: as much of it as the other has
                if start < first or end > last or start >= end:
                    raise refusal(
                        f"{self.name}.with: a text of {len(source.ids)} tokens has no numbers for "
                        f"all positions [{start}, {end}) of one of {prompt.length}; the two "
                        "prompts are aligned at their ends",
                        f"{self.name}.with",
                    )
                own = self._numbers.shaped(layer, numbers[start - first : end - first])
                edits.append(self._made(layer, ((start, end),), own, True))
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
        if do == "patch":
            do = "set"
        if do == "ablate":
            do = "scale" if request.instead == "zero" and not request.has_source else "set"
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
            feature=self.feature,
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
                raise refusal(
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
        if part == "weights":
            own = anatomy.attention[layer]
            reason = f"layer {layer} is {own.reason}"
            if own.available:
                reason = (
                    f"model type {anatomy.model_type} does not show where layer {layer} uses them"
                )
            raise ModelNotCapable(
                f"{self.request.do} needs attention weights; {reason}", param=f"{self.name}.layers"
            )
        message = (
            f"layer {layer} of model type {anatomy.model_type} has no {WORDS[part]} that can be "
            "addressed"
        )
        if part == "neuron" and anatomy.routing and layer in anatomy.routing.layers:
            message += ': it is a mixture of experts; use part "mlp"'
        raise ModelNotCapable(message, param=param)

    def _units(self, layer: int) -> tuple[int, ...]:
        request = self.request
        if request.part == "weights" or request.part in INPUTS:
            return self._chosen("heads", "all" if request.heads is None else request.heads, layer)
        if request.part not in ("head", "neuron"):
            return ()
        name = "heads" if request.part == "head" else "neurons"
        units = request.heads if request.part == "head" else request.neurons
        if units is None:
            raise refusal(f"{self.name}.{name} is required for part {request.part}", self.name)
        return self._chosen(name, units, layer)

    def _chosen(
        self, name: str, units: tuple[int, ...] | Literal["all"], layer: int
    ) -> tuple[int, ...]:
        """The heads or the neurons of a layer that are named."""
        places = self.facts.editable.of(layer)
        assert self.model.inspector is not None
        count = {
            "head": places.heads,
            "neuron": places.neurons,
            "weights": self.model.inspector.anatomy.attention[layer].heads,
            **{part: heads for part, (heads, _) in places.inputs.items()},
        }[self.request.part]
        if units == "all":
            return tuple(range(count))
        if not all(0 <= unit < count for unit in units):
            raise refusal(f"{self.name}.{name} must be in [0, {count - 1}]", f"{self.name}.{name}")
        return tuple(dict.fromkeys(units))


def _changes_nothing(edit: Edit) -> bool:
    is_zero = edit.vector is not None and not edit.vector.any()
    return edit.do in ("add", "erase") and is_zero
