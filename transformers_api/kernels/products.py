"""Products that no layer holds the weights of: small matrices, complex numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers_api.kernels.capture import Recorder

LARGEST_INNER = 16  # terms of a sum that is no layer's
LARGEST_MATRIX = 1 << 22  # elements of a matrix that is no layer's, such as a router's


def operand(value: Any) -> Tensor:
    """A tensor, or a number as one."""
    return value if isinstance(value, Tensor) else torch.full((1,), float(value))


def matmul(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows times a matrix that no layer holds, such as that of a router."""
    *bias, x, matrix = args[:3]
    if kwargs or len(bias) > 1 or recorder.is_dynamic(matrix) or matrix.numel() > LARGEST_MATRIX:
        return False
    if x.dtype != torch.float32 or matrix.dtype != torch.float32 or x.stride(-1) != 1:
        return False
    rows = matrix.t() if matrix.t().is_contiguous() else matrix.t().contiguous()
    recorder.add("matmul", out, [x, rows, *bias], tuple(out.shape), float(rows.shape[1]))
    return True


def batch_product(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    """(B, n, k) times (B, k, m) for a small k; 1 where rotary embeddings multiply positions."""
    a, b = args
    if a.shape[2] == 1:
        recorder.add("mul", out, [a, b], tuple(out.shape))
        return True
    if a.shape[2] > LARGEST_INNER:
        return False
    products = torch.empty((*out.shape, a.shape[2]))
    factors = [a[:, :, None], b.transpose(1, 2)[:, None]]
    recorder.add("mul", products, factors, tuple(products.shape))
    recorder.add("sum", out[..., None], [products], tuple(products.shape))
    return True


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
