"""Mixtures of experts over packed weights, for transformers' experts interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from transformers_api.kernels.abi import TYPES, Experts, Library
from transformers_api.kernels.capture import current
from transformers_api.kernels.modules.blocks import Matrix
from transformers_api.kernels.modules.linear import LONG, PackedWeight
from transformers_api.kernels.modules.streamed import Source, StreamedLinear, streamed_product
from transformers_api.kernels.modules.weight_memory import WeightMemory

NAME, STREAMED = "native", "streamed"
Sources = Sequence[Sequence[Source]]  # of each expert, one below the other


class PackedExperts:
    """The matrices (out, in) of a layer's experts, each a PackedWeight of the same kind.

    Seen as one matrix where only its size counts: ``out_features`` are those of all experts.
    """

    def __init__(self, library: Library, weights: list[PackedWeight]) -> None:
        self.library = library
        self.weights = weights
        self.in_features = weights[0].in_features
        self.width = weights[0].out_features
        self.out_features = self.width * len(weights)
        self._pointers = (ctypes.c_void_p * len(weights))(*[w.address for w in weights])
        self._experts = Experts(count=len(weights), weights=ctypes.addressof(self._pointers))

    @property
    def address(self) -> int:
        """The address of its Experts structure, constant during its life."""
        return ctypes.addressof(self._experts)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def error(self) -> float:
        """The largest error of an expert; see PackedWeight."""
        return max(weight.error for weight in self.weights)

    def multiply(self, x: Tensor, indices: Tensor) -> Tensor:
        """The products (R, out) of rows with the experts ``indices`` (R,).

        ``x`` (R / n, in), where each row is taken by n of the indices. float32 or bfloat16.
        """
        x, indices = x.contiguous(), indices.contiguous()
        rows, share = len(indices), len(indices) // len(x)
        y = x.new_empty((rows, self.width))
        if recorder := current():  # a recording needs no indices
            sizes = (rows,)
            recorder.add("experts", y.zero_(), [x, indices], sizes, share, call=self.address)
            return y
        call = self.library.with_gil if rows < LONG else self.library.without_gil
        call.experts(
            self.address,
            x.data_ptr(),
            indices.data_ptr(),
            rows,
            share,
            y.data_ptr(),
            TYPES[x.dtype],
        )
        return y


class _Multiply(torch.autograd.Function):
    """Differentiable with respect to the input; the weights are fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, packed: PackedExperts) -> Tensor:
        ctx.packed, ctx.indices, ctx.rows = packed, indices, len(x)
        return packed.multiply(x, indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        packed, indices = ctx.packed, ctx.indices
        made = gradient.new_zeros((len(indices), packed.in_features), dtype=torch.float32)
        for expert in indices.unique().tolist():
            if 0 <= expert < len(packed.weights):
                rows = indices == expert
                made[rows] = gradient[rows].float() @ packed.weights[expert].dense()
        made = made.view(ctx.rows, -1, packed.in_features).sum(1)
        return made.to(gradient.dtype), None, None


def _multiply(packed: PackedExperts, x: Tensor, indices: Tensor) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Multiply.apply(x, indices, packed))  # type: ignore[no-untyped-call]
    return packed.multiply(x, indices)


def register() -> None:
    """Make ``native`` an experts implementation of transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, native_experts)


def native_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of each row's experts, in the order of its choice: (R, hidden).

    ``top_k_index`` and ``top_k_weights`` (R, k).
    """
    indices = top_k_index.reshape(-1)
    made = _gated(module, _multiply(module.packed_up, hidden_states, indices))
    return _summed(module, _multiply(module.packed_down, made, indices), top_k_weights)


def streamed_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same with experts whose weights stay in their files."""
    count = top_k_index.shape[1]
    indices = top_k_index.reshape(-1)
    inputs = hidden_states.repeat_interleave(count, dim=0)
    made = inputs.new_zeros(inputs.shape)
    for expert in set(indices.tolist()):
        if 0 <= expert < len(module.streamed[_up(module)]):
            own = indices == expert
            inner = _gated(module, _streamed_product(module, _up(module), expert, inputs[own]))
            made[own] = _streamed_product(module, "down_proj", expert, inner)
    return _summed(module, made, top_k_weights)


def _streamed_product(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    parts = [streamed_product(source, x) for source in module.streamed[name][expert]]
    made = torch.cat(parts, dim=-1)
    return made + getattr(module, f"{name}_bias")[expert] if module.has_bias else made


def _gated(module: Any, made: Tensor) -> Tensor:
    gated: Tensor = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    return gated


def _summed(module: Any, made: Tensor, weights: Tensor) -> Tensor:
    """The sum (R, hidden) of what experts made (R * k, hidden) with ``weights`` (R, k)."""
    rows, count = weights.shape
    if module.has_post_expert_norm:
        made = module.post_expert_norm(made)
    parts = made.view(rows, count, -1) * weights[..., None].to(made.dtype)
    total = parts[:, 0]
    for rank in range(1, count):
        total = total + parts[:, rank]
    return total


def _up(layer: Any) -> str:
    return "gate_up_proj" if layer.has_gate else "up_proj"


def expert_layers(model: nn.Module) -> Iterator[Any]:
    """Modules whose ``forward`` transformers hands to an experts implementation."""
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "down_proj"):
            yield module


def router_layers(model: nn.Module) -> set[Any]:
    """Linear layers that choose among experts: what they say decides which weights are read."""
    return {
        layer
        for parent, experts in _mixtures(model)
        for layer in parent.modules()
        if type(layer) in (nn.Linear, StreamedLinear) and layer.out_features == experts.num_experts
    }


def routing_modules(model: nn.Module) -> list[nn.Module]:
    """Modules beside experts, one of which is their router."""
    return [
        m for parent, experts in _mixtures(model) for m in parent.children() if m is not experts
    ]


def _mixtures(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Modules that contain experts, and the experts."""
    for parent in model.modules():
        for child in parent.children():
            if hasattr(child, "_is_expert_parallel"):
                yield parent, child


def stream_experts(
    model: Any, sources_of: Callable[[str, Any], Sources | None], names: Callable[[Any], str]
) -> None:
    """Leave the weights of all experts in their files, where those of every layer may stay there.

    ``sources_of(name, layer)``: the matrices of a parameter; ``names(layer)``: the layer's path.
    """
    layers = list(expert_layers(model))
    streamed: list[dict[str, Sources]] = []
    for layer in layers:
        made = {}
        for name in (_up(layer), "down_proj"):
            sources = sources_of(f"{names(layer)}.{name}", layer)
            if sources is None:
                return
            made[name] = sources
        streamed.append(made)
    if not layers:
        return
    ALL_EXPERTS_FUNCTIONS.register(STREAMED, streamed_experts)
    model.set_experts_implementation(STREAMED)
    for layer, made in zip(layers, streamed, strict=True):
        layer.streamed = made
        for name in made:
            _leave_shape(layer, name)


def _leave_shape(layer: Any, name: str) -> None:
    """Put a shape into the place of a parameter; as one it would make the model be on ``meta``."""
    old: Tensor = getattr(layer, name)
    delattr(layer, name)
    setattr(layer, name, torch.empty(old.shape, dtype=old.dtype, device="meta"))


def pack_experts(
    model: Any, library: Library, kind_of: Callable[[Sources], str], memory: WeightMemory
) -> None:
    """Pack the experts of all layers, each layer's old weights freed before the next.

    ``kind_of``: the kind of PackedWeight for the matrices of files; for none, that of the others.
    """
    layers = list(expert_layers(model))
    if not layers:
        return
    register()
    model.set_experts_implementation(NAME)
    for layer in layers:
        layer.packed_up = _pack(layer, _up(layer), library, kind_of, memory)
        layer.packed_down = _pack(layer, "down_proj", library, kind_of, memory)
        layer.streamed = {}


def _pack(
    layer: Any,
    name: str,
    library: Library,
    kind_of: Callable[[Sources], str],
    memory: WeightMemory,
) -> PackedExperts:
    sources: Sources = getattr(layer, "streamed", {}).get(name, ())
    kind = kind_of(sources)
    biases = getattr(layer, f"{name}_bias").detach() if layer.has_bias else None
    weights = []
    for i, matrices in enumerate(_matrices(layer, name, sources, memory)):
        weight = PackedWeight(library, matrices, kind, memory)
        if biases is not None:
            weight.set_bias(biases[i])
        weights.append(weight)
    _leave_shape(layer, name)
    return PackedExperts(library, weights)


def _matrices(
    layer: Any, name: str, sources: Sources, memory: WeightMemory
) -> Iterator[list[Matrix]]:
    """The matrices (out, in) of each expert, one below the other."""
    if not sources:
        parameter = getattr(layer, name).detach()
        for matrix in parameter.transpose(1, 2) if layer.is_transposed else parameter:
            yield [matrix]
    for parts in sources:
        matrices = [source.matrix() for source in parts]
        yield matrices
        for source, matrix in zip(parts, matrices, strict=True):
            memory.release(source, matrix)
