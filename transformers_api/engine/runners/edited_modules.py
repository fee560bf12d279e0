"""Changes of what a model's modules are given or make, while a forward pass runs.

An edit writes into the rows of one tensor. Where a pass calls the modules, hooks hand them a copy
of it; a recorded pass stops where the tensor is in memory (kernels/graph/hooks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from transformers_api.engine.watched_pass import is_number

Apply = Callable[[Tensor], None]  # writes into rows (N, width): the tokens of the pass, in order


class RowsChange(NamedTuple):
    """A change that a backend may make itself, in float32.

    Of ``width`` columns from ``column`` on, of the rows of ``tokens`` from ``start`` on: z becomes
    z + ``vector`` ("add"), ``by`` times z ("scale"), or ``vector`` ("set"). ``state`` is the
    address of two int64: the ``number`` of the first change of its sequence that is no number or
    longer than ``largest``, after which none is made, or 0; and nanoseconds, to which is added.
    """

    do: Literal["add", "scale", "set"]
    start: int
    tokens: int
    column: int
    width: int  # 0: all columns
    vector: int  # the address of float32; 0: none
    vector_stride: int  # from the vector of a row to that of the next; 0: all have one
    by: float
    largest: float
    number: int
    state: int


@dataclass(frozen=True, slots=True)
class ModuleEdit:
    """A change of the first tensor that a module is given ("in") or makes ("out").

    ``changes``: all that ``apply`` does; None: more than such changes.
    """

    module: str
    side: Literal["in", "out"]
    apply: Apply
    changes: Sequence[RowsChange] | None = None


_current: ContextVar[Sequence[ModuleEdit]] = ContextVar("edits", default=())


def current_edits() -> Sequence[ModuleEdit]:
    """The edits of the pass that is about to run."""
    return _current.get()


@contextmanager
def editing(edits: Sequence[ModuleEdit]) -> Iterator[None]:
    """Let passes within the block be changed, after what blocks around it change.

    One edit for each module and side.
    """
    token = _current.set(_joined(_current.get(), edits))
    try:
        yield
    finally:
        _current.reset(token)


def _joined(outer: Sequence[ModuleEdit], inner: Sequence[ModuleEdit]) -> Sequence[ModuleEdit]:
    if not outer:
        return inner
    joined = {(edit.module, edit.side): edit for edit in outer}
    for edit in inner:
        key = edit.module, edit.side
        before = joined.get(key)
        joined[key] = edit if before is None else _then(before, edit)
    return list(joined.values())


def _then(first: ModuleEdit, second: ModuleEdit) -> ModuleEdit:
    def both(rows: Tensor) -> None:
        first.apply(rows)
        second.apply(rows)

    return ModuleEdit(first.module, first.side, both)


@contextmanager
def hooked(model: Any, edits: Sequence[ModuleEdit]) -> Iterator[None]:
    """Apply ``edits`` wherever the model's modules are called, within the block."""
    with ExitStack() as stack:
        for edit in edits:
            module = model.get_submodule(edit.module)
            handle = (
                module.register_forward_pre_hook(_before(edit.apply), with_kwargs=True)
                if edit.side == "in"
                else module.register_forward_hook(_after(edit.apply))
            )
            stack.callback(handle.remove)
        yield


def _before(apply: Apply) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = next((i for i, value in enumerate(args) if is_number(value)), None)
        if place is not None:
            return (*args[:place], _changed(args[place], apply), *args[place + 1 :]), kwargs
        name = next(name for name, value in kwargs.items() if is_number(value))
        return args, {**kwargs, name: _changed(kwargs[name], apply)}

    return hook


def _after(apply: Apply) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _changed(output, apply)
        if isinstance(output, dict):
            name = next(iter(output))
            output[name] = _changed(output[name], apply)
            return output
        return type(output)((_changed(output[0], apply), *output[1:]))

    return hook


def _changed(tensor: Tensor, apply: Apply) -> Tensor:
    own = tensor.clone(memory_format=torch.contiguous_format)
    apply(own.view(-1, own.shape[-1]))
    return own
