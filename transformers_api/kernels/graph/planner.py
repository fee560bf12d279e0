"""Memory and shape planning: two recordings of a forward pass make a plan for every size.

All that the native program needs is numbers: sizes, strides, addresses. Each is an affine function
of the number of tokens, base + slope * tokens, and two samples determine an affine function. So two
recordings of different sizes give the program for all sizes; recordings in which a number is not
affine, such as one that is rounded up to a power of two, are refused.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformers_api.kernels.abi import OPERAND_TYPES, OPS, TYPES, Operand, Step
from transformers_api.kernels.capture import ModuleCall, Operation, Recorder, Ref
from transformers_api.kernels.graph.fusion import fuse
from transformers_api.kernels.graph.gates import joined_gates
from transformers_api.kernels.graph.tiling import (
    DIMENSIONS,
    KERNELS,
    LoopNest,
    NotRecordable,
    StepGroup,
    collapsed_loops,
    step_groups,
)

Words = NDArray[numpy.int64]
Pair = tuple[int, int]
ALIGNMENT = 64
WORD = 8
STEP_WORDS = ctypes.sizeof(Step) // WORD


@dataclass(frozen=True)
class Recording:
    """A recorded pass over ``inputs`` that returned ``result``."""

    size: int
    recorder: Recorder
    inputs: list[Tensor]
    result: Tensor


@dataclass(frozen=True)
class Affine:
    """Integers that are affine functions of the size: base + (n - size) * slope."""

    size: int
    base: Words
    slope: Words

    def at(self, size: int) -> Words:
        """The integers for this size."""
        return self.base + (size - self.size) * self.slope


@dataclass(frozen=True)
class HookPoint:
    """A module call that hooks may observe after ``at`` steps, when its tensors are in memory."""

    module: Any
    at: int
    tensors: list[Affine]  # address, sizes, strides
    dtypes: list[torch.dtype]
    cached: tuple[int, int] | None  # indices of its key and value in the cache
    options: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The native program in words of 8 bytes, and its relocations.

    A relocation is the index of a word to which a base address is added before the program runs.
    """

    size: int
    steps: Affine
    calls: Affine
    memory: Affine
    inputs: Affine  # addresses
    result: Affine  # address, sizes, strides
    result_dtype: torch.dtype
    step_relocations: Words  # relative to the memory
    call_relocations: Words  # relative to the memory
    step_call_relocations: Words  # relative to the calls
    weights: Words  # words of the steps that hold addresses of weights
    constants: list[tuple[int, int, int]]  # 1: of the calls, word, index of the tensor
    cache_words: list[tuple[int, int, int]]  # word of a pointer, of its strides, index in the cache
    constant_tensors: list[Tensor]
    hook_points: list[HookPoint]
    width: int = STEP_WORDS
    # Words of the steps for the address of the adapters' numbers; see adapted.py.
    adapter_words: Words = field(default_factory=lambda: numpy.zeros(0, numpy.int64))


def make_plan(a: Recording, b: Recording, cache: list[Tensor]) -> Plan:
    """A plan for every size, from recordings of two. Raises NotRecordable."""
    for recording in (a, b):
        recording.recorder.ref(recording.result)  # an unknown operation may have written it
    if failure := a.recorder.failure or b.recorder.failure:
        raise NotRecordable(failure)
    a, b = (replace(r, recorder=fuse(r.recorder, r.result)) for r in (a, b))
    same_calls = len(a.recorder.module_calls) == len(b.recorder.module_calls)
    if not same_calls or [s.op for s in a.recorder.steps] != [s.op for s in b.recorder.steps]:
        raise NotRecordable("operations that depend on the size")
    return _Planner(a, b, cache).plan()


@dataclass
class _Words:
    """The words of both recordings, and their relocations."""

    a: list[int] = field(default_factory=list)
    b: list[int] = field(default_factory=list)
    relocations: list[int] = field(default_factory=list)
    call_relocations: list[int] = field(default_factory=list)

    def add(self, a: Sequence[int], b: Sequence[int]) -> int:
        """Append the words of a structure; returns the index of its first."""
        start = len(self.a)
        self.a += a
        self.b += b
        return start


class _Planner:
    """Builds a plan from two recordings, step by step in parallel."""

    def __init__(self, a: Recording, b: Recording, cache: list[Tensor]) -> None:
        self.a, self.b = a, b
        self.cache = {t.untyped_storage().data_ptr(): i for i, t in enumerate(cache)}
        self.sizes = a.size, b.size
        self.module_calls = list(zip(a.recorder.module_calls, b.recorder.module_calls, strict=True))
        self.pairs = list(zip(a.recorder.steps, b.recorder.steps, strict=True))
        self.steps, self.calls = _Words(), _Words()
        self.cache_words: list[tuple[int, int, int]] = []
        self.weights: list[int] = []
        self.constants: list[tuple[int, int, int]] = []
        self.constant_tensors: list[Tensor] = []
        # Where hooks see a tensor they may change it, and all that comes after is to see that.
        cuts = {call.at for call in a.recorder.module_calls}
        groups = list(step_groups(self.pairs, self.sizes, cuts))
        hooked = [tensor for call in a.recorder.module_calls for tensor in call.tensors]
        others = [a.recorder.ref(tensor).storage for tensor in (*hooked, *a.inputs, a.result)]
        self.groups: list[StepGroup] = joined_gates(groups, a.recorder, others)
        self.ends = [group.end for group in self.groups]
        self.offsets, self.memory = self._allocate()

    def plan(self) -> Plan:
        for group in self.groups:
            pairs = self.pairs[group.begin : group.end]
            for nth, pair in enumerate(pairs, -group.opens_with_product):
                at = self._add_step(*pair, group.loops[nth] if group.loops and nth >= 0 else None)
                if group.loops and nth <= 0:
                    count = len(group.loops) - nth
                    self._set(self.steps, at + Step.fused.offset // WORD, (count, count))
        inputs = [self._offset(r) for r in self._input_refs()]
        result = self._result_ref()
        if result[0].tensor.dtype not in TYPES or not result[0].is_dynamic:
            raise NotRecordable("a result of another kind")
        return Plan(
            size=self.a.size,
            steps=self._affine(self.steps.a, self.steps.b),
            calls=self._affine(self.calls.a, self.calls.b),
            memory=self._affine([self.memory[0]], [self.memory[1]]),
            inputs=self._affine([offset[0] for offset in inputs], [offset[1] for offset in inputs]),
            result=self._tensor(result),
            result_dtype=result[0].tensor.dtype,
            hook_points=[self._hook_point(x, y) for x, y in self.module_calls],
            step_relocations=numpy.array(self.steps.relocations, numpy.int64),
            call_relocations=numpy.array(self.calls.relocations, numpy.int64),
            step_call_relocations=numpy.array(self.steps.call_relocations, numpy.int64),
            weights=numpy.array(self.weights, numpy.int64),
            constants=self.constants,
            cache_words=self.cache_words,
            constant_tensors=self.constant_tensors,
        )

    def _tensor(self, pair: tuple[Ref, Ref]) -> Affine:
        """Address, sizes, strides."""
        return self._affine(
            *(
                [offset, *ref.tensor.shape, *ref.tensor.stride()]
                for offset, ref in zip(self._offset(pair), pair, strict=True)
            )
        )

    def _hook_point(self, x: ModuleCall, y: ModuleCall) -> HookPoint:
        pairs = self._call_refs(x, y)
        cached = [t.untyped_storage().data_ptr() for t in (x.key, x.value) if t is not None]
        if len({pair[0].storage for pair in pairs}) < len(pairs):
            raise NotRecordable("a layer that changes what it is given")
        return HookPoint(
            x.module,
            x.at,
            [self._tensor(pair) for pair in pairs],
            [tensor.dtype for tensor in x.tensors],
            (self.cache[cached[0]], self.cache[cached[1]]) if cached else None,
            x.options,
        )

    def _group_of(self, call: ModuleCall) -> int:
        """The index of the group that ends with the call."""
        return bisect.bisect_left(self.ends, call.at)

    def _call_refs(self, x: ModuleCall, y: ModuleCall) -> list[tuple[Ref, Ref]]:
        refs = [[one.recorder.ref(t) for t in s.tensors] for one, s in ((self.a, x), (self.b, y))]
        pairs = list(zip(*refs, strict=True))
        if not all(ref.is_dynamic for pair in pairs for ref in pair):
            raise NotRecordable("a layer that returns what the pass does not make")
        return pairs

    def _affine(self, a: list[int], b: list[int]) -> Affine:
        first, second = numpy.array(a, numpy.int64), numpy.array(b, numpy.int64)
        slope, rest = numpy.divmod(second - first, self.sizes[1] - self.sizes[0])
        if rest.any():
            raise NotRecordable("sizes that do not grow evenly")
        return Affine(self.sizes[0], first, slope)

    def _input_refs(self) -> list[tuple[Ref, Ref]]:
        refs = [[one.recorder.ref(t) for t in one.inputs] for one in (self.a, self.b)]
        return list(zip(*refs, strict=True))

    def _result_ref(self) -> tuple[Ref, Ref]:
        return self.a.recorder.ref(self.a.result), self.b.recorder.ref(self.b.result)

    def _allocate(self) -> tuple[dict[Pair, Pair], Pair]:
        """(offset of each storage, bytes in all), by liveness: memory is reused after its last use.

        Not within a fused group of steps, where one thread may be ahead of another. Storages come
        in the order of their use, so that a model has the same plan wherever its tensors lay.
        """
        used = [
            {
                (x.storage, y.storage): None
                for first, second in self.pairs[group.begin : group.end]
                for x, y in zip(first.refs, second.refs, strict=True)
                if x.is_dynamic
            }
            for group in self.groups
        ]
        for calls in self.module_calls:  # alive until hooks have observed it
            used[self._group_of(calls[0])] |= {
                (x.storage, y.storage): None for x, y in self._call_refs(*calls)
            }
        last = {pair: i for i, pairs in enumerate(used) for pair in pairs}
        forever = [(x.storage, y.storage) for x, y in [*self._input_refs(), self._result_ref()]]
        offsets: dict[Pair, Pair] = {}
        free: dict[Pair, list[Pair]] = {}
        end = (0, 0)
        for i, pairs in enumerate([dict.fromkeys(forever), *used], -1):
            for pair in [pair for pair in pairs if pair not in offsets]:
                length = self._length(pair)
                if free.get(length):
                    offsets[pair] = free[length].pop()
                else:
                    offsets[pair], end = end, (end[0] + length[0], end[1] + length[1])
            for pair in pairs:
                if last[pair] == i and pair not in forever:
                    free.setdefault(self._length(pair), []).append(offsets[pair])
        return offsets, end

    def _length(self, pair: Pair) -> Pair:
        """Bytes; base and slope are rounded up apart, so that the length stays affine."""
        try:
            a, b = self.a.recorder.sizes[pair[0]], self.b.recorder.sizes[pair[1]]
        except KeyError:
            raise NotRecordable("tensors that are constant for one size only") from None
        slope, rest = divmod(b - a, self.sizes[1] - self.sizes[0])
        if rest or slope < 0:
            raise NotRecordable("sizes that do not grow evenly")
        fixed = _rounded(max(a - slope * self.sizes[0], 0))
        return fixed + _rounded(slope) * self.sizes[0], fixed + _rounded(slope) * self.sizes[1]

    def _offset(self, pair: tuple[Ref, Ref]) -> Pair:
        start = self.offsets[pair[0].storage, pair[1].storage]
        return start[0] + pair[0].offset, start[1] + pair[1].offset

    def _address(self, pair: tuple[Ref, Ref]) -> tuple[Pair, bool]:
        """(address for each size, True where it is relative to the memory)."""
        x, y = pair
        if x.is_dynamic != y.is_dynamic:
            raise NotRecordable("tensors that are constant for one size only")
        if x.is_dynamic:
            return self._offset(pair), True
        if x.tensor.data_ptr() != y.tensor.data_ptr() and not torch.equal(x.tensor, y.tensor):
            raise NotRecordable("constants that depend on the size")
        self.constant_tensors.append(x.tensor)
        return (x.tensor.data_ptr(), x.tensor.data_ptr()), False

    def _add_step(self, a: Operation, b: Operation, loops: LoopNest | None) -> int:
        if a.number != b.number or type(a.call) is not type(b.call):
            raise NotRecordable("numbers that depend on the size")
        sizes: Any = (*a.sizes, 1, 1, 1), (*b.sizes, 1, 1, 1)
        strides: Any = [[(0,) * DIMENSIONS] * len(a.refs)] * 2
        if loops or a.op not in KERNELS:
            loops = loops or collapsed_loops(a, b)
            sizes, strides = loops.sizes, loops.strides
        count = len(a.refs) - 1
        at = self.steps.add(*(_step(a.op, count, a.number, n[:DIMENSIONS]) for n in sizes))
        if a.fields:
            self._add_call(a, b, at)
            return at
        if isinstance(a.call, int):
            self.weights.append(at + Step.call.offset // WORD)
            self._set(self.steps, self.weights[-1], (a.call, b.call))
        for i, pair in enumerate(zip(a.refs, b.refs, strict=True)):
            is_out = i == len(a.refs) - 1
            offset = Step.out.offset if is_out else Step.inputs.offset + i * ctypes.sizeof(Operand)
            self._add_operand(at + offset // WORD, pair, (strides[0][i], strides[1][i]))
        return at

    def _add_operand(
        self, at: int, pair: tuple[Ref, Ref], strides: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> None:
        kind = OPERAND_TYPES.get(pair[0].tensor.dtype)
        if kind is None:
            raise NotRecordable(f"tensors of {pair[0].tensor.dtype}")
        address, is_relative = self._address(pair)
        if is_relative:
            self.steps.relocations.append(at)
        else:
            self.constants.append((0, at, len(self.constant_tensors) - 1))
        words = zip((self.steps.a, self.steps.b), address, strides, strict=True)
        for of, where, each in words:
            of[at : at + 2 + DIMENSIONS] = [where, *each, kind]

    def _add_call(self, a: Operation, b: Operation, step: int) -> None:
        start = self.calls.add(_as_words(a.call), _as_words(b.call))
        word = step + Step.call.offset // WORD
        self._set(self.steps, word, (start * WORD, start * WORD))
        self.steps.call_relocations.append(word)
        for name, pair in zip(a.fields, zip(a.refs, b.refs, strict=True), strict=True):
            at = start + getattr(type(a.call), name).offset // WORD
            if (index := self.cache.get(pair[0].storage)) is not None:
                strides = getattr(type(a.call), f"{name}_strides").offset // WORD
                self.cache_words.append((at, start + strides, index))
                for i in range(3):
                    self._set(self.calls, start + strides + i, (0, 0))
                self._set(self.calls, at, (0, 0))
                continue
            address, is_relative = self._address(pair)
            self._set(self.calls, at, address)
            if is_relative:
                self.calls.relocations.append(at)
            else:
                self.constants.append((1, at, len(self.constant_tensors) - 1))

    @staticmethod
    def _set(words: _Words, at: int, pair: Pair) -> None:
        words.a[at], words.b[at] = pair


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _as_words(struct: ctypes.Structure) -> list[int]:
    words: list[int] = numpy.frombuffer(bytes(struct), numpy.int64).tolist()
    return words


@functools.lru_cache(4096)
def _step(op: str, count: int, number: float, sizes: tuple[int, ...]) -> list[int]:
    """The words of a step with ``count`` inputs, whose operands are not filled in.

    Cached, because the layers of a model are alike.
    """
    step = Step(op=OPS.index(op), operands=count, scalar=number)
    step.sizes = sizes
    return _as_words(step)
