"""Operator fusion by pattern matching: several small operations that are one function become one.

Some models write their activation out: each of its operations goes through all columns of the
widest layer and makes a tensor that is read once. Patterns are expression trees, matched against
the data flow of the recorded operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_api.kernels.capture import Operation, Recorder, Ref

X = "x"
ROOT = math.sqrt(2 / math.pi)
HALF = ("mul", X, 0.5)
TANH_OF_CUBE = ("tanh", ("mul", ("add", X, ("mul", ("cube", X), 0.044715)), ROOT))
TANH_OF_SQUARE = (
    "tanh",
    ("mul", ("mul", X, ROOT), ("add", ("mul", ("mul", X, 0.044715), X), 1.0)),
)
PATTERNS = [  # expression, number of operations, the operation that computes the same
    (("mul", HALF, ("add", TANH_OF_CUBE, 1.0)), 8, "gelu_tanh"),
    (("mul", HALF, ("add", TANH_OF_SQUARE, 1.0)), 9, "gelu_tanh"),
]
IN_ALL = "tanh"  # a pass without it has none of them
TOLERANCE = 1e-6  # of constants, which have been rounded to float32


def fuse(recorder: Recorder, result: Tensor) -> Recorder:
    """The same pass with fewer operations; ``recorder`` itself where no pattern matches."""
    if not any(step.op == IN_ALL for step in recorder.steps):
        return recorder
    matches = list(_Matcher(recorder, result).matches())
    if not matches:
        return recorder
    ends = {where[-1]: (op, x) for where, op, x in matches}
    inside = {i for where, _, _ in matches for i in where[:-1]}
    steps: list[Operation] = []
    position: list[int] = []  # the new index of each old operation
    for i, step in enumerate(recorder.steps):
        position.append(len(steps))
        if i in ends:
            op, x = ends[i]
            steps.append(Operation(op, [x, step.refs[-1]], step.sizes))
        elif i not in inside:
            steps.append(step)
    position.append(len(steps))
    shorter = recorder.copy()
    shorter.steps = steps
    shorter.module_calls = [replace(c, at=position[c.at]) for c in recorder.module_calls]
    return shorter


class _Matcher:
    """Matches PATTERNS against the operations of a recorder."""

    def __init__(self, recorder: Recorder, result: Tensor) -> None:
        self.steps = recorder.steps
        self.hook_positions = {call.at for call in recorder.module_calls}
        self.writers: dict[int, list[int]] = {}  # indices of the operations that write a storage
        self.uses: Counter[int] = Counter()  # of each storage, as an operand or from outside
        for i, step in enumerate(self.steps):
            if step.op != "write_cache":
                self.writers.setdefault(step.refs[-1].storage, []).append(i)
            self.uses.update(ref.storage for ref in step.refs)
        observed = [tensor for call in recorder.module_calls for tensor in call.tensors]
        self.uses.update(t.untyped_storage().data_ptr() for t in (*observed, result))

    def matches(self) -> Iterator[tuple[range, str, Ref]]:
        """(indices of the operations, the operation that replaces them, its operand)."""
        for end in range(1, len(self.steps) + 1):
            for pattern, count, op in PATTERNS:
                where = range(max(0, end - count), end)
                if self.steps[end - 1].op == pattern[0] and (x := self._operand(pattern, where)):
                    yield where, op, x

    def _operand(self, pattern: Any, where: range) -> Ref | None:
        """The operand of the pattern that these operations compute; None if they do not.

        Each intermediate result must be written once and read once, so that nobody else needs it.
        """
        own = [self.steps[i] for i in where]
        last, bound = own[-1], list[Ref]()
        if not self._matches_step(pattern, where[-1], where, bound):
            return None
        is_plain = all(_is_plain(ref, last.sizes) for step in own for ref in step.refs)
        is_private = all(self.uses[step.refs[-1].storage] == 2 for step in own[:-1])
        is_observed = any(at in where[1:] for at in self.hook_positions)
        return bound[0] if is_plain and is_private and not is_observed else None

    def _matches_step(self, pattern: Any, at: int, where: range, bound: list[Ref]) -> bool:
        op, *operands = pattern
        step, refs = self.steps[at], self.steps[at].refs[:-1]
        if step.op != op or len(refs) != len(operands) or (op == "add" and step.number != 1):
            return False
        for order in (refs, refs[::-1])[: len(refs)]:
            candidate = list(bound)
            pairs = zip(operands, order, strict=True)
            if all(self._matches_ref(each, ref, where, candidate) for each, ref in pairs):
                bound[:] = candidate
                return True
        return False

    def _matches_ref(self, pattern: Any, ref: Ref, where: range, bound: list[Ref]) -> bool:
        if pattern == X:
            bound.append(ref)
            return ref.is_dynamic and _same(ref, bound[0])
        if isinstance(pattern, float):
            is_constant = not ref.is_dynamic and ref.tensor.numel() == 1
            return is_constant and abs(float(ref.tensor) - pattern) <= TOLERANCE
        writers = self.writers.get(ref.storage, [])
        if len(writers) != 1 or writers[0] not in where:
            return False
        is_whole = _same(self.steps[writers[0]].refs[-1], ref)
        return is_whole and self._matches_step(pattern, writers[0], where, bound)


def _same(a: Ref, b: Ref) -> bool:
    """True where both are the same elements of the same memory."""
    views = [(r.storage, r.offset, r.tensor.shape, r.tensor.stride()) for r in (a, b)]
    return views[0] == views[1]


def _is_plain(ref: Ref, sizes: tuple[int, ...]) -> bool:
    """True for a float32 tensor of these sizes, or a constant."""
    if not ref.is_dynamic:
        return True
    return ref.tensor.dtype == torch.float32 and tuple(ref.tensor.shape) == sizes
