"""Several small operations that are one function, done as one.

Some models write their activation out: each of its operations goes through all columns of the
widest layer, and makes a tensor that is read once. What the kernels know as one function is found
by what is computed from what, in the operations as they were recorded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_api.kernels.capture import Recorded, Recorder, Ref

X = "x"
ROOT = math.sqrt(2 / math.pi)
HALF = ("mul", X, 0.5)
TANH_OF_CUBE = ("tanh", ("mul", ("add", X, ("mul", ("cube", X), 0.044715)), ROOT))
TANH_OF_SQUARE = (
    "tanh",
    ("mul", ("mul", X, ROOT), ("add", ("mul", ("mul", X, 0.044715), X), 1.0)),
)
FORMS = [  # what is computed, how many operations it takes, and the operation that does the same
    (("mul", HALF, ("add", TANH_OF_CUBE, 1.0)), 8, "gelu_tanh"),
    (("mul", HALF, ("add", TANH_OF_SQUARE, 1.0)), 9, "gelu_tanh"),
]
NEAR = 1e-6  # of a constant: it has been rounded to float32


def fused(recorder: Recorder, result: Tensor) -> Recorder:
    """The same pass with fewer operations; ``recorder`` itself where there is nothing to do."""
    found = list(_Finder(recorder, result).found())
    if not found:
        return recorder
    ends = {where[-1]: (op, x) for where, op, x in found}
    inside = {i for where, _, _ in found for i in where[:-1]}
    steps: list[Recorded] = []
    now: list[int] = []  # of each operation that there was: how many are before it now
    for i, step in enumerate(recorder.steps):
        now.append(len(steps))
        if i in ends:
            op, x = ends[i]
            steps.append(Recorded(op, [x, step.refs[-1]], step.sizes))
        elif i not in inside:
            steps.append(step)
    now.append(len(steps))
    made = recorder.branch()
    made.steps, made.shown = steps, [replace(s, at=now[s.at]) for s in recorder.shown]
    return made


class _Finder:
    """Looks for FORMS in what a recorder has seen."""

    def __init__(self, recorder: Recorder, result: Tensor) -> None:
        self.steps = recorder.steps
        self.views = {one.at for one in recorder.shown}
        self.writers: dict[int, list[int]] = {}  # operations that write a storage
        self.uses: Counter[int] = Counter()  # of each storage, as an operand or from outside
        for i, step in enumerate(self.steps):
            if step.op != "write_cache":
                self.writers.setdefault(step.refs[-1].storage, []).append(i)
            self.uses.update(ref.storage for ref in step.refs)
        shown = [tensor for one in recorder.shown for tensor in one.tensors]
        self.uses.update(t.untyped_storage().data_ptr() for t in (*shown, result))

    def found(self) -> Iterator[tuple[range, str, Ref]]:
        """(which operations are one, the one that does the same, its operand)."""
        for end in range(1, len(self.steps) + 1):
            for form, count, op in FORMS:
                where = range(max(0, end - count), end)
                if self.steps[end - 1].op == form[0] and (x := self._operand(form, where)):
                    yield where, op, x

    def _operand(self, form: Any, where: range) -> Ref | None:
        """What these operations compute ``form`` of, if nobody needs what is made on the way.

        Each result on the way is written once and read once, so that they are all of the form.
        """
        own = [self.steps[i] for i in where]
        last, bound = own[-1], list[Ref]()
        if not self._is_made(form, where[-1], where, bound):
            return None
        is_plain = all(_is_plain(ref, last.sizes) for step in own for ref in step.refs)
        is_theirs = all(self.uses[step.refs[-1].storage] == 2 for step in own[:-1])
        is_seen = any(at in where[1:] for at in self.views)
        return bound[0] if is_plain and is_theirs and not is_seen else None

    def _is_made(self, form: Any, at: int, where: range, bound: list[Ref]) -> bool:
        op, *wanted = form
        step, given = self.steps[at], self.steps[at].refs[:-1]
        if step.op != op or len(given) != len(wanted) or (op == "add" and step.number != 1):
            return False
        for order in (given, given[::-1])[: len(given)]:
            tried = list(bound)
            pairs = zip(wanted, order, strict=True)
            if all(self._is(each, ref, where, tried) for each, ref in pairs):
                bound[:] = tried
                return True
        return False

    def _is(self, form: Any, ref: Ref, where: range, bound: list[Ref]) -> bool:
        if form == X:
            bound.append(ref)
            return ref.is_dynamic and _same(ref, bound[0])
        if isinstance(form, float):
            is_constant = not ref.is_dynamic and ref.tensor.numel() == 1
            return is_constant and abs(float(ref.tensor) - form) <= NEAR
        writers = self.writers.get(ref.storage, [])
        if len(writers) != 1 or writers[0] not in where:
            return False
        is_whole = _same(self.steps[writers[0]].refs[-1], ref)
        return is_whole and self._is_made(form, writers[0], where, bound)


def _same(a: Ref, b: Ref) -> bool:
    """Whether both are the same numbers of the same memory."""
    places = [(r.storage, r.offset, r.tensor.shape, r.tensor.stride()) for r in (a, b)]
    return places[0] == places[1]


def _is_plain(ref: Ref, sizes: tuple[int, ...]) -> bool:
    """A float32 tensor of these sizes, or a constant."""
    if not ref.is_dynamic:
        return True
    return ref.tensor.dtype == torch.float32 and tuple(ref.tensor.shape) == sizes
