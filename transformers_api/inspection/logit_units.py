"""The shares of heads and neurons in a logit: by products, or a direction before their module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transformers_api.inspection.adjoints import frozen, pulled
from transformers_api.inspection.logit_share import LogitShare
from transformers_api.inspection.token_rows import TokenRows


@dataclass(frozen=True, slots=True)
class HeadShares:
    """The numbers that heads add along a direction, and the bias behind them."""

    values: Tensor  # (H,) float64
    bias: float
    edits: list[LogitShare]


def head_shares(
    model: Any,
    rows: TokenRows,
    place: tuple[str, Sequence[str]],
    direction: Tensor,
    heads: int,
    layer: int,
) -> HeadShares:
    """The heads that a module (its name, the norms after it) reads: one product of a row for each.

    Weights are packed for products: to take a direction backwards through them costs several.
    """
    name, after = place
    direction, added = _through(model, rows, after, direction)
    x, moved = rows.inputs[name], rows.moved.get((name, "in"))
    batch = x.new_zeros(heads + 2, len(x))
    own = x if moved is None else (x.float() - moved).to(x.dtype)
    batch[:heads].view(heads, heads, -1).diagonal(dim1=0, dim2=1).copy_(own.view(heads, -1).T)
    if moved is not None:
        batch[heads] = moved.to(x.dtype)
    made = model.get_submodule(name)(batch[None])[0].double() @ direction
    values = made - made[-1]
    edits = [] if moved is None else [LogitShare("edit", layer, float(values[heads]), of="head")]
    return HeadShares(values[:heads], added + float(made[-1]), edits)


def input_direction(
    model: Any, rows: TokenRows, name: str | None, after: Sequence[str], direction: Tensor
) -> tuple[Tensor, float]:
    """The direction of a linear module's input, and what biases add along ``direction``.

    ``after``: the norms between the module and the stream, the nearest to the module first.
    """
    assert name is not None
    direction, added = _through(model, rows, after, direction)
    before, own = pulled(model.get_submodule(name), rows.inputs[name], direction)
    return before, added + own


def _through(
    model: Any, rows: TokenRows, norms: Sequence[str], direction: Tensor
) -> tuple[Tensor, float]:
    """The direction before ``norms``, and what their biases add along it."""
    added = 0.0
    for name in reversed(norms):
        norm = frozen(model.get_submodule(name), rows.inputs[name])
        added += float(norm.constant @ direction)
        direction = norm.adjoint(direction)
    return direction, added
