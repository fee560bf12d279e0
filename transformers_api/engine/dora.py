"""DoRA: adapters that also give each row of a weight a length (arXiv:2402.09353).

The weight is m (W + s B A) / |W + s B A|, row by row. Beside the layer that is a gain of its
outputs, an offset that leaves its bias as it is, and the product with the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

AT_ONCE_BYTES = 16 << 20  # of float32
Rescaling = tuple[Tensor, Tensor]  # gain and offset (out)


def rescaled(layer: Any, down: Tensor, up: Tensor, lengths: Tensor, path: str) -> Rescaling:
    """Gain and offset of a layer's outputs. ``up`` (out, rank) is scaled; ``lengths`` (out).

    Norms are those of the weights that are served, as they are packed. Raises ValueError.
    """
    out, width = len(up), down.shape[1]
    norms, rows_of = torch.empty(out), _rows_of(layer)
    few = max(AT_ONCE_BYTES // (4 * width), 1)
    for first in range(0, out, few):
        count = min(few, out - first)
        rows = rows_of(first, count).float().cpu()
        norms[first : first + count] = (rows + up[first : first + count] @ down).norm(dim=1)
    gain = lengths / norms
    if not torch.isfinite(gain).all():
        raise ValueError(f"the rows of {path} have no length that could be another one")
    bias = _bias(layer)
    return gain, torch.zeros(out) if bias is None else bias.float().cpu() * (1 - gain)


def _rows_of(layer: Any) -> Callable[[int, int], Tensor]:
    """A reader of rows (count, in) of a linear layer's weight, wherever that is."""
    if (joined := getattr(layer, "joined", None)) is not None:
        start = sum(joined.sizes[: layer.index])

        def rows(first: int, count: int) -> Tensor:
            made: Tensor = joined.weight.rows(torch.arange(start + first, start + first + count))
            return made

        return rows
    packed = getattr(layer, "packed", None)
    weight: Tensor = layer.weight.detach() if packed is None else packed.to_dense()
    own = weight.t() if isinstance(layer, Conv1D) else weight
    return lambda first, count: own[first : first + count]


def _bias(layer: Any) -> Tensor | None:
    if (joined := getattr(layer, "joined", None)) is not None:
        start = sum(joined.sizes[: layer.index])
        whole: Tensor | None = joined.weight.bias
        return None if whole is None else whole[start : start + joined.sizes[layer.index]]
    bias: Tensor | None = layer.bias
    return None if bias is None else bias.detach()
