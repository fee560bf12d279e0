"""Numbers of a model that are not finite: one error for tokens, scores and vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transformers_api.errors import EngineFailed, ModelLoadFailed


def not_finite() -> EngineFailed:
    """The error of a request for which the model gives infinities or NaN."""
    return EngineFailed("The model produced numbers that are not finite")


def checked(numbers: Tensor) -> Tensor:
    """``numbers`` as they are. Raises EngineFailed where one of them is not finite."""
    if not torch.isfinite(numbers).all():
        raise not_finite()
    return numbers


def check_logits(logits: Iterable[Tensor]) -> None:
    """Raise ModelLoadFailed where no token can be drawn by one of these."""
    if any(bool((each.isnan() | each.isposinf()).any()) for each in logits):
        raise ModelLoadFailed(
            "The model's logits are not finite: its weights hold NaN or infinities, or are too "
            "large for the numbers that it computes in",
            param="model",
        )


@contextmanager
def showing_overflow(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's last norm makes NaN of states whose squares are infinite.

    By its formula it makes zeros of them, and of those the head makes tokens like any others.
    """
    with ExitStack() as hooks:
        for norm in _outer_norms(model):
            hooks.callback(norm.register_forward_hook(_show_overflow).remove)
        yield


def _outer_norms(model: nn.Module) -> Iterable[nn.Module]:
    """The norms that are in none of the model's layers."""
    for module in model.children():
        if "Norm" in type(module).__name__:
            yield module
        elif not isinstance(module, nn.ModuleList):
            yield from _outer_norms(module)


def _show_overflow(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
        return output
    squares = args[0].float().square().sum(-1, keepdim=True)
    return output.masked_fill(~torch.isfinite(squares), torch.nan)
