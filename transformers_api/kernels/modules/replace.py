"""Replacement of a model's Linear and Embedding layers by those on packed weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
    WeightMemory,
)


@dataclass(frozen=True)
class Place:
    """A layer and its attribute in the parent module."""

    parent: nn.Module
    name: str
    layer: Any

    @property
    def weight(self) -> Tensor:
        """The matrix as (out, in), however the layer stores it."""
        weight: Tensor = self.layer.weight
        return weight.t() if type(self.layer) is Conv1D else weight


def pack_model(model: Any, library: Library, kind: str, groups: list[list[Place]]) -> None:
    """Replace Linear, Conv1D and tied Embedding layers, each old weight freed before the next.

    Experts too. ``kind`` see PackedWeight; with int4 the output layer is int8, and routers stay
    float32. ``groups`` see ``layer_groups``. The rest of the model, above all norms, becomes
    float32, and so do its activations.
    """
    memory = WeightMemory()
    tied = _tied_embeddings(model)
    head = model.get_output_embeddings()
    routing = router_layers(model)
    for group in groups:
        is_output = any(place.layer is head for place in group)
        width = "int8" if kind == "int4" and is_output else kind
        if any(place.layer in routing for place in group):
            width = "float32"
        packed = _pack_group(group, library, width, memory, {id(p.layer.weight) for p in tied})
        if len(group) == 1:
            _replace_embeddings(tied, group[0].layer.weight, packed)
    pack_experts(model, library, kind, memory)
    model.float()
    for parameter in model.parameters():  # else a norm's few bytes keep the whole file mapped
        parameter.data = parameter.data.clone()


def _pack_group(
    group: list[Place], library: Library, kind: str, memory: WeightMemory, shared: set[int]
) -> PackedWeight:
    packed = PackedWeight(library, [place.weight for place in group], kind, memory)
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


def _replace_embeddings(tied: list[Place], weight: Tensor, packed: PackedWeight) -> None:
    for place in tied:
        if place.layer.weight is weight:
            setattr(place.parent, place.name, NativeEmbedding(packed, _shape_only(weight)))


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
        if type(child) is NativeLinear
        or (type(child) in (nn.Linear, Conv1D) and _weight(child).is_floating_point())
    }


def _tied_embeddings(model: nn.Module) -> list[Place]:
    weights = {id(place.layer.weight) for place in places_of(model).values()}
    return [
        Place(module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Embedding and id(child.weight) in weights and child.max_norm is None
    ]


def layer_groups(model: Any, forward: Callable[[], object]) -> list[list[Place]]:
    """Layers in the order of their calls in ``forward``; consecutive ones with one input joined.

    Layers that the pass does not reach, or reaches twice, stay single.
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
    return groups + [[place] for layer, place in places.items() if times[layer] != 1]
