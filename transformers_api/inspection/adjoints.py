"""Directions taken backwards through norms and linear modules, which are known by what they do."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from transformers_api.errors import ModelNotCapable

FAR = 64.0  # numbers of a vector whose variance hides what a norm adds to it
NOT_AFFINE = 0.02  # relative: a norm with frozen statistics rounds, and is no further off


@dataclass(frozen=True, slots=True)
class Affine:
    """A map x -> scale * x + constant, after the mean was taken away where it ``centres``."""

    scale: Tensor  # (C,) float64
    constant: Tensor  # (C,)
    centres: bool

    def adjoint(self, direction: Tensor) -> Tensor:
        """The direction (C,) before the map, of one after it."""
        scaled = self.scale * direction
        return scaled - scaled.mean() if self.centres else scaled


def frozen(norm: nn.Module, x: Tensor) -> Affine:
    """A norm with the statistics that it has for ``x`` (C,). Raises ModelNotCapable.

    Its weight is its answer to a vector of large numbers of one size; it centres where a constant
    added to ``x`` makes no difference.
    """
    rows = x.double()
    signs = torch.ones_like(rows)
    signs[1::2] = -1

    def answer(row: Tensor) -> Tensor:
        normed: Tensor = norm(row.to(x.dtype)[None, None])[0, 0]
        return normed.double()

    zero, own = answer(torch.zeros_like(rows)), answer(rows)
    weight = (answer(FAR * signs) - zero) * signs
    moved = answer(rows + 3) - own
    centres = bool(moved.norm() < 0.05 * own.norm())
    centred = rows - rows.mean() if centres else rows
    scaled = weight * centred
    size = (scaled @ (own - zero)) / (scaled @ scaled).clamp_min(1e-60)
    off = (size * scaled - (own - zero)).norm() / (own - zero).norm().clamp_min(1e-30)
    if not off < NOT_AFFINE:
        raise ModelNotCapable(
            f"what a {type(norm).__name__} does is not a norm's (off by {float(off):.2g}), so the "
            "parts of a logit cannot be told apart",
            param="model",
        )
    return Affine(size * weight, zero, centres)


def pulled(module: nn.Module, x: Tensor, direction: Tensor) -> tuple[Tensor, float]:
    """Of a linear module: the direction (in,) of its input, and what its bias adds along it.

    ``direction`` is one of its output, float64.
    """
    with torch.inference_mode(False), torch.enable_grad():
        own = direction.clone()
        leaf = x.clone()[None, None].requires_grad_()
        value = (module(leaf)[0, 0].double() * own).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
    zero = module(torch.zeros_like(x)[None, None])[0, 0].double()
    return gradient[0, 0].double(), float(zero @ direction)


class MeanDirections:
    """The direction before a head that leads to the mean of all logits, and what biases add to it.

    It takes a product with the whole head, and is the same for every token.
    """

    def __init__(self) -> None:
        self._by_head: WeakKeyDictionary[nn.Module, tuple[Tensor, float]] = WeakKeyDictionary()

    def of(self, head: nn.Module, x: Tensor, size: int, vocab_size: int) -> tuple[Tensor, float]:
        """(C,) float64, and the constant; ``x`` (C,) is any input, ``size`` that of the output."""
        if head not in self._by_head:
            shares = torch.zeros(size, dtype=torch.float64, device=x.device)
            shares[:vocab_size] = 1 / vocab_size
            self._by_head[head] = pulled(head, x, shares)
        return self._by_head[head]
