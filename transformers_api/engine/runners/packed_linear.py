"""Linear layers with their weights laid out for the CPU's matrix kernels.

``torch.nn.Linear`` reads its weights as they lie in memory; with the few rows of a decode step a
CPU then uses a fraction of its bandwidth. oneDNN's own layout, made once at load, makes a step of
a small model clearly faster (benchmarks/decode.py).
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A Linear for inference on a CPU. The packed copy is the only one, unless others share it."""

    def __init__(self, linear: nn.Linear, is_shared: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias
        # code that asks for its shape or dtype gets an answer; its numbers are in ``packed``
        self.weight = linear.weight if is_shared else nn.Parameter(linear.weight.to("meta"), False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (…, in) gives (…, out)."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _PackedProduct.apply(x, self.packed, self.bias)  # type: ignore[no-untyped-call]
            return y
        return _product(x, self.packed, self.bias)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


class _PackedProduct(torch.autograd.Function):
    """The same product with a gradient for ``x``, which the kernel itself has none for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.packed = packed  # as an attribute: autograd saves no tensor of this layout
        return _product(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.packed.to_dense(), None, None


def can_pack(dtype: torch.dtype) -> bool:
    """True where this processor has oneDNN's products of such weights."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:  # AVX-512, or AVX2 with conversions
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def called_linears(model: nn.Module, forward: Callable[[], object]) -> WeakSet[nn.Module]:
    """Return the Linear layers that ``forward`` calls: of others only the weights may be used.

    It keeps none of them alive, so that each goes when it is replaced.
    """
    called = WeakSet[nn.Module]()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module))
        for module in model.modules()
        if type(module) is nn.Linear
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def pack_linears(model: Any, layers: Container[nn.Module] | None = None) -> None:
    """Replace Linear layers of a model on a CPU, one by one, where that is possible.

    ``layers``: those that may be replaced; None: all.
    """
    if model.device.type != "cpu" or not can_pack(model.dtype):
        return
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in [m.weight]}
    for module in [each for each in model.modules() if type(each) is not nn.Linear]:
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or (layers is not None and child not in layers):
                continue
            if child.weight.dtype == model.dtype:
                setattr(module, name, PackedLinear(child, id(child.weight) in embeddings))
