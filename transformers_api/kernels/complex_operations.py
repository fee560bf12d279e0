"""Operations with complex numbers, as ropes of some models have them, by those with real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers_api.kernels.capture import Recorder


def operand(value: Any) -> Tensor:
    """A number of an operation as a tensor; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.full((1,), float(value))


def polar(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Complex numbers from their sizes and angles."""
    size, angle = args
    for part, op in enumerate(("cos", "sin")):
        made = torch.view_as_real(out)[..., part]
        recorder.add(op, made, [angle], tuple(made.shape))
        recorder.add("mul", made, [made, size], tuple(made.shape))
    return True


def complex_product(recorder: Recorder, args: Any, out: Tensor) -> bool:
    """A product of complex numbers, or of complex and real ones."""
    x, y = args
    made = torch.view_as_real(out)
    if not (isinstance(x, Tensor) and x.is_complex()):
        x, y = y, x
    a = torch.view_as_real(x)
    if not (isinstance(y, Tensor) and y.is_complex()):
        factor = y[..., None] if isinstance(y, Tensor) and y.dim() else operand(y)
        recorder.add("mul", made, [a, factor], tuple(made.shape))
        return True
    b = torch.view_as_real(y)
    sizes = tuple(made.shape[:-1])
    for part, (first, second, op) in enumerate((((0, 0), (1, 1), "sub"), ((0, 1), (1, 0), "add"))):
        products = [torch.empty(sizes) for _ in range(2)]
        for product, (i, j) in zip(products, (first, second), strict=True):
            recorder.add("mul", product, [a[..., i], b[..., j]], sizes)
        recorder.add(op, made[..., part], products, sizes, 1.0)
    return True
