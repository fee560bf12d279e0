"""Linear layers with their weights laid out for the CPU's matrix kernels.

``torch.nn.Linear`` reads its weights as they lie in memory; with the few rows of a decode step a
CPU then uses a fraction of its bandwidth. oneDNN's own layout, made once at load, makes a step of
a small model clearly faster (benchmarks/decode.py).
"""

from __future__ import annotations

from typing import Any

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
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def pack_linears(model: Any) -> None:
    """Replace the Linear layers of a float32 or bfloat16 model on a CPU, one by one."""
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        return
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in [m.weight]}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == model.dtype:
                setattr(module, name, PackedLinear(child, id(child.weight) in embeddings))
