"""Products that no layer computes: with a small matrix, of few terms, of filters and lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers_api.kernels.capture import Recorder

LARGEST_MATRIX = 1 << 22  # elements of a matrix that is no layer's, such as a router's
LARGEST_INNER = 16  # terms of a sum that is no layer's


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
    """(B, n, k) times (B, k, m) for a small k, or by one row or column, as a state is read."""
    a, b = args
    if a.shape[2] == 1:
        recorder.add("mul", out, [a, b], tuple(out.shape))
        return True
    if a.shape[2] > LARGEST_INNER and 1 not in (a.shape[1], b.shape[2]):
        return False
    products = torch.empty((*out.shape, a.shape[2]))
    factors = [a[:, :, None], b.transpose(1, 2)[:, None]]
    recorder.add("mul", products, factors, tuple(products.shape))
    recorder.add("sum", out[..., None], [products], tuple(products.shape))
    return True


def convolution(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Each channel's own filter over its line (B, C, n), as before a recurrence."""
    x, weight, bias, stride, padding, dilation, is_transposed, _, groups = args
    channels, one, size = weight.shape
    is_plain = not is_transposed and {*stride, *dilation} == {1} and not any(padding)
    if x.dim() != 3 or one != 1 or groups != channels or x.shape[1] != channels or not is_plain:
        return False
    products = torch.empty((*out.shape, size))
    factors = [x.unfold(2, size, 1), weight.expand(channels, out.shape[2], size)]
    recorder.add("mul", products, factors, tuple(products.shape))
    recorder.add("sum", out[..., None], [products], tuple(products.shape))
    if bias is not None:
        recorder.add("add", out, [out, bias[:, None]], tuple(out.shape), 1.0)
    return True
