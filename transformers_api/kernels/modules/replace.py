"""Replacement of a model's Linear and Embedding layers by those on packed weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.experts import pack_experts, router_layers
from transformers_api.kernels.modules.linear import (
    JoinedWeights,
    NativeEmbedding,
    NativeLinear,
    PackedWeight,
)
from transformers_api.kernels.modules.streamed import Source, StreamedEmbedding, StreamedLinear
from transformers_api.kernels.modules.weight_memory import WeightMemory

QUANTIZED = ("int8", "int4")  # for whatever the files have


@dataclass(frozen=True)
class Place:
    """A layer and its attribute in the parent module."""

    parent: nn.Module
    name: str
    layer: Any

    @property
    def weight(self) -> Tensor:
        """The matrix as (out, in), however the layer stores it; of a streamed one the shape."""
        weight: Tensor = self.layer.weight
        return weight.t() if type(self.layer) is Conv1D else weight

    @property
    def source(self) -> Source | None:
        """The file's matrix of a streamed layer."""
        source: Source | None = getattr(self.layer, "source", None)
        return source

    @property
    def identity(self) -> int:
        """The same for all layers with the same matrix."""
        return id(self.source or self.layer.weight)


@dataclass(frozen=True)
class Widths:
    """The kinds of PackedWeight of a model. ``numbers``: of weights that are not quantised.

    ``quantization``: "none", "int8", "int4" (the output layer is int8 then); any other is the name
    of a format: as their files have them.
    """

    numbers: str
    quantization: str = "none"

    @property
    def plain(self) -> str:
        """The kind for matrices that no file holds in blocks."""
        return self.quantization if self.quantization in QUANTIZED else self.numbers

    def of(self, place: Place, is_output: bool = False) -> str:
        """The kind for a layer."""
        if self.quantization == "none":
            return self.numbers
        if self.quantization in QUANTIZED:
            return "int8" if is_output else self.quantization
        source = place.source
        return (source.width if source else None) or self.numbers

    def of_experts(self, experts: Sequence[Sequence[Source]]) -> str:
        """The kind for the matrices of a layer's experts, which is one."""
        if self.quantization == "none" or self.quantization in QUANTIZED:
            return self.plain
        widths = {source.width for parts in experts for source in parts}
        return self.numbers if None in widths or not widths else max(w for w in widths if w)


def pack_model(
    model: Any,
    library: Library,
    widths: Widths,
    groups: list[list[Place]],
    memory: WeightMemory | None = None,
) -> None:
    """Replace Linear, Conv1D and Embedding layers, each old weight freed before the next.

    Experts too; routers stay float32. Embeddings: those that are tied to a layer, or streamed.
    ``groups`` see ``layer_groups``. ``memory``: for the weights, or with them. The rest of the
    model, above all norms, becomes float32, and so do its activations.
    """
    memory = memory or WeightMemory()
    embeddings = _packed_embeddings(model)
    head = model.get_output_embeddings()
    routing = router_layers(model)
    for group in groups:
        for part, width in _by_width(group, widths, head):
            if any(place.layer in routing for place in part):
                width = "float32"
            packed = _pack_group(part, library, width, memory)
            if len(part) == 1:
                _replace_embeddings(embeddings, part[0].identity, packed)
    for place in embeddings:  # those of no layer
        if getattr(place.parent, place.name) is place.layer and place.source is not None:
            width = place.source.exact or widths.of(place, is_output=True)
            matrix = place.source.matrix()
            packed = PackedWeight(library, [matrix], width, memory)
            packed.sources = [place.source]
            memory.release(place.source, matrix)
            _replace_embeddings(embeddings, place.identity, packed)
    pack_experts(model, library, widths.of_experts, memory)
    model.float()
    for parameter in model.parameters():  # else a norm's few bytes keep the whole file mapped
        parameter.data = parameter.data.clone()


def _by_width(group: list[Place], widths: Widths, head: Any) -> Iterator[tuple[list[Place], str]]:
    """The parts of a group that follow each other in one width."""

    def width(place: Place) -> str:
        return widths.of(place, any(each.layer is head for each in group))

    return ((list(part), kind) for kind, part in groupby(group, key=width))


def _pack_group(
    group: list[Place], library: Library, kind: str, memory: WeightMemory
) -> PackedWeight:
    sources = [place.source for place in group if place.source is not None]
    matrices = [s.matrix() if (s := place.source) else place.weight for place in group]
    packed = PackedWeight(library, matrices, kind, memory)
    if len(sources) == len(group):
        packed.sources = sources
    for place, matrix in zip(group, matrices, strict=True):
        if place.source is not None:
            memory.release(place.source, matrix)
    biases = [getattr(place.layer, "bias", None) for place in group]
    sizes = [len(place.weight) for place in group]
    if any(bias is not None for bias in biases):
        parts = [torch.zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)]
        packed.set_bias(torch.cat([part.detach().float() for part in parts]))
    joined = JoinedWeights(packed, sizes)
    for index, place in enumerate(group):
        is_transposed = type(place.layer) is Conv1D
        linear = NativeLinear(joined, index, _shape_only(place.weight), is_transposed)
        linear.train(place.layer.training)
        setattr(place.parent, place.name, linear)
    return packed


def _replace_embeddings(places: list[Place], identity: int, packed: PackedWeight) -> None:
    for place in places:
        if place.identity == identity:
            scale = getattr(place.layer, "scale", None)
            native = NativeEmbedding(packed, _shape_only(place.layer.weight), scale)
            setattr(place.parent, place.name, native)


def _shape_only(weight: Tensor) -> Tensor:
    """A meta tensor; as a parameter it would make the model one on the device ``meta``."""
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


def places_of(model: nn.Module) -> dict[str, Place]:
    """All layers that can be or have been replaced, by their path."""
    return {
        f"{path}.{name}": Place(module, name, child)
        for path, module in model.named_modules()
        for name, child in module.named_children()
        if type(child) in (NativeLinear, StreamedLinear)
        or (type(child) in (nn.Linear, Conv1D) and _weight(child).is_floating_point())
    }


def is_embedding(module: Any) -> bool:
    """True for a table of rows, which may all be multiplied with ``embed_scale``."""
    is_plain = type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")
    return is_plain and module.max_norm is None


def _packed_embeddings(model: nn.Module) -> list[Place]:
    weights = {place.identity for place in places_of(model).values()}
    places = [
        Place(module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is StreamedEmbedding or type(child) is nn.Embedding
    ]
    return [
        place
        for place in places
        if place.source is not None or (place.identity in weights and place.layer.max_norm is None)
    ]


def layer_groups(
    model: Any, forward: Callable[[], object], *, only_called: bool = False
) -> list[list[Place]]:
    """Layers in the order of their calls in ``forward``; consecutive ones with one input joined.

    Layers that the pass does not reach, or reaches twice, stay single. With ``only_called`` those
    that it does not reach are left out: a model may use their weights itself.
    """
    places = {place.layer: place for place in places_of(model).values()}
    calls: list[tuple[Any, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0])))
        for layer in places
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(layer for layer, _ in calls)
    groups: list[list[Place]] = []
    last: Tensor | None = None
    for layer, x in calls:
        if times[layer] > 1:
            last = None
            continue
        if x is last:
            groups[-1].append(places[layer])
        else:
            groups.append([places[layer]])
        last = x
    others = [
        layer for layer in places if times[layer] != 1 and not (only_called and not times[layer])
    ]
    return groups + [[places[layer]] for layer in others]
