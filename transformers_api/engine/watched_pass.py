"""One small forward pass of a model, watched: which modules were called, in what order, with what.

No table of names: what a module is shows in what it is x and what it gives.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# Token ids, modulo the vocabulary: the first ones are often special, with streams so large that
# what a layer adds to them is lost in rounding.
PROBE = (1, 2, 3, 101, 211, 307, 401, 503)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module. Holding the tensors keeps their addresses from being used again.

    ``x``, the stream or else the first argument, and ``y`` are copies of their numbers.
    """

    name: str
    module: nn.Module
    stream: Tensor | None
    result: Tensor | None
    output: Any
    x: Tensor | None
    y: Tensor | None

    @property
    def is_leaf(self) -> bool:
        """True for a module without modules in it."""
        return next(self.module.children(), None) is None


Watched = tuple[list[Call], Tensor]
_held: contextvars.ContextVar[dict[int, tuple[Any, Watched]] | None] = contextvars.ContextVar(
    "held", default=None
)


@contextmanager
def holding_passes() -> Iterator[None]:
    """While it lasts, a model that was watched is not run again to be watched once more.

    Nobody may change it in between.
    """
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def watched_pass(model: Any, *, with_copies: bool = False) -> Watched:
    """Every call of a module, in the order in which they end, and the logits (T, V)."""
    held = _held.get()
    if held is not None and not with_copies and id(model) in held:
        return held[id(model)][1]
    calls, logits = _watch(model, with_copies)
    if held is not None:  # the copies are large, and whoever wants them has them now
        held[id(model)] = model, ([replace(call, x=None, y=None) for call in calls], logits)
    return calls, logits


def _watch(model: Any, with_copies: bool) -> Watched:
    calls: list[Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stream, result = stream_of(args, kwargs), first_of(output)
            x = first_of(args) if stream is None else stream
            pair = (x, result) if with_copies else (None, None)
            copies = (None if each is None else each.detach().clone() for each in pair)
            calls.append(Call(name, module, stream, result, output, *copies))

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(note(name), with_kwargs=True)
                stack.callback(handle.remove)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.tensor([PROBE], device=model.device) % vocabulary
        output = model(input_ids=ids, use_cache=False, return_dict=True)
    return calls, output.logits[0]


def layer_names(model: Any, calls: list[Call]) -> tuple[str, ...]:
    """The list of as many modules as there are layers, all of which pass (B, T, C) on."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    order = {call.name: place for place, call in enumerate(calls)}
    passing = {call.name for call in calls if not call.is_leaf and _passes(call)}
    by_end: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            children = tuple(f"{name}.{index}" for index in range(count))
            if passing.issuperset(children):
                by_end[order[children[-1]]] = children
    return by_end[max(by_end)] if by_end else ()  # the one that ends next to the head


def _passes(call: Call) -> bool:
    stream, result = call.stream, call.result
    return (
        stream is not None
        and result is not None
        and stream.shape == result.shape
        and stream.shape[:-1] == (1, len(PROBE))
    )


def first_of(output: Any) -> Tensor | None:
    """The tensor that a module passes on: its output, or the first of several."""
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if is_number(output) else None


def is_number(value: Any) -> bool:
    """True for a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def stream_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor (B, T, C) that a module was x."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return value
    return None
