"""Two recordings of a forward pass make a plan for every size.

All that the native program needs is numbers: sizes, strides, places in memory. Between a pass of
n tokens and one of m they differ by a multiple of n - m, or not at all; so what holds for two
sizes is known for all. Recordings that differ in another way are refused.
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

from transformers_api.kernels.abi import OPERAND_TYPES, OPS, Operand, Step
from transformers_api.kernels.capture import Recorded, Recorder, Ref, Shown
from transformers_api.kernels.graph.fusion import fused
from transformers_api.kernels.graph.tiling import (
    DIMENSIONS,
    KERNELS,
    Lines,
    NotRecordable,
    Unit,
    plain_lines,
    units,
)

Words = NDArray[numpy.int64]
Pair = tuple[int, int]
ALIGNMENT = 64
WORD = 8
STEP_WORDS = ctypes.sizeof(Step) // WORD


@dataclass(frozen=True)
class Learned:
    """One recording: of ``inputs``, ``result`` came out."""

    size: int
    recorder: Recorder
    inputs: list[Tensor]
    result: Tensor


@dataclass(frozen=True)
class Line:
    """Numbers that are a straight line over the size."""

    size: int
    base: Words
    slope: Words

    def at(self, size: int) -> Words:
        """The numbers for this size."""
        return self.base + (size - self.size) * self.slope


@dataclass(frozen=True)
class View:
    """A call that can be shown when ``at`` steps have been done: its tensors are there then."""

    module: Any
    at: int
    tensors: list[Line]  # place, sizes, strides
    dtypes: list[torch.dtype]
    cached: tuple[int, int] | None  # which tensors of the cache are its key and value
    options: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The native program in words of 8 bytes, with what has to be added to some of them."""

    size: int
    steps: Line
    calls: Line
    memory: Line
    inputs: Line  # places
    result: Line  # place, sizes, strides
    step_places: Words  # words that count from the beginning of the memory
    call_places: Words
    step_calls: Words  # words that count from the beginning of the calls
    weights: Words  # words of the steps that are addresses of weights
    constants: list[tuple[int, int, int]]  # whether of the calls, the word, whose address it is
    cache_words: list[tuple[int, int, int]]  # a call's pointer, its strides, which of the cache
    kept: list[Tensor]  # constants
    views: list[View]
    width: int = STEP_WORDS


def make_plan(a: Learned, b: Learned, cache: list[Tensor]) -> Plan:
    """A plan for every size. Raises NotRecordable."""
    for one in (a, b):
        one.recorder.ref(one.result)  # it may be what an unknown operation wrote last
    if failure := a.recorder.failure or b.recorder.failure:
        raise NotRecordable(failure)
    a, b = (replace(one, recorder=fused(one.recorder, one.result)) for one in (a, b))
    same = len(a.recorder.shown) == len(b.recorder.shown)
    if not same or [s.op for s in a.recorder.steps] != [s.op for s in b.recorder.steps]:
        raise NotRecordable("operations that depend on the size")
    return _Planner(a, b, cache).plan()


@dataclass
class _Words:
    """Words of both recordings, and which of them are addresses."""

    a: list[int] = field(default_factory=list)
    b: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    def add(self, a: Sequence[int], b: Sequence[int]) -> int:
        """Append the words of a struct; where it begins."""
        start = len(self.a)
        self.a += a
        self.b += b
        return start


class _Planner:
    """Goes through two recordings side by side."""

    def __init__(self, a: Learned, b: Learned, cache: list[Tensor]) -> None:
        self.a, self.b = a, b
        self.cache = {t.untyped_storage().data_ptr(): i for i, t in enumerate(cache)}
        self.sizes = a.size, b.size
        self.shown = list(zip(a.recorder.shown, b.recorder.shown, strict=True))
        self.pairs = list(zip(a.recorder.steps, b.recorder.steps, strict=True))
        self.steps, self.calls = _Words(), _Words()
        self.cache_words: list[tuple[int, int, int]] = []
        self.weights: list[int] = []
        self.constants: list[tuple[int, int, int]] = []
        self.kept: list[Tensor] = []
        self.units: list[Unit] = list(units(self.pairs, self.sizes))
        self.ends = [unit.end for unit in self.units]
        self.places, self.memory = self._lay_out()

    def plan(self) -> Plan:
        for unit in self.units:
            for nth, pair in enumerate(self.pairs[unit.begin : unit.end]):
                at = self._add_step(*pair, unit.lines[nth] if unit.lines else None)
                if unit.lines and not nth:
                    count = unit.end - unit.begin
                    self._set(self.steps, at + Step.fused.offset // WORD, (count, count))
        inputs = [self._place(r) for r in self._input_refs()]
        result = self._result_ref()
        if result[0].tensor.dtype != torch.float32 or not result[0].is_dynamic:
            raise NotRecordable("a result of another kind")
        return Plan(
            size=self.a.size,
            steps=self._line(self.steps.a, self.steps.b),
            calls=self._line(self.calls.a, self.calls.b),
            memory=self._line([self.memory[0]], [self.memory[1]]),
            inputs=self._line([place[0] for place in inputs], [place[1] for place in inputs]),
            result=self._described(result),
            views=[self._view(x, y) for x, y in self.shown],
            step_places=numpy.array(self.steps.places, numpy.int64),
            call_places=numpy.array(self.calls.places, numpy.int64),
            step_calls=numpy.array(self.steps.calls, numpy.int64),
            weights=numpy.array(self.weights, numpy.int64),
            constants=self.constants,
            cache_words=self.cache_words,
            kept=self.kept,
        )

    def _described(self, pair: tuple[Ref, Ref]) -> Line:
        """Place, sizes, strides."""
        return self._line(
            *(
                [place, *ref.tensor.shape, *ref.tensor.stride()]
                for place, ref in zip(self._place(pair), pair, strict=True)
            )
        )

    def _view(self, x: Shown, y: Shown) -> View:
        pairs = self._shown_refs(x, y)
        cached = [t.untyped_storage().data_ptr() for t in (x.key, x.value) if t is not None]
        if len({pair[0].storage for pair in pairs}) < len(pairs):
            raise NotRecordable("a layer that changes what it is given")
        end = self.units[self._unit_of(x)].end
        after = [r for r in self.a.recorder.steps[x.at : end] if r.op != "write_cache"]
        if {pair[0].storage for pair in pairs} & {r.refs[-1].storage for r in after}:
            raise NotRecordable("results of a layer that are changed at once")
        return View(
            x.module,
            end,
            [self._described(pair) for pair in pairs],
            [tensor.dtype for tensor in x.tensors],
            (self.cache[cached[0]], self.cache[cached[1]]) if cached else None,
            x.options,
        )

    def _unit_of(self, shown: Shown) -> int:
        """Which steps have to be done before the call can be shown."""
        return bisect.bisect_left(self.ends, shown.at)

    def _shown_refs(self, x: Shown, y: Shown) -> list[tuple[Ref, Ref]]:
        refs = [[one.recorder.ref(t) for t in s.tensors] for one, s in ((self.a, x), (self.b, y))]
        pairs = list(zip(*refs, strict=True))
        if not all(ref.is_dynamic for pair in pairs for ref in pair):
            raise NotRecordable("a layer that returns what the pass does not make")
        return pairs

    def _line(self, a: list[int], b: list[int]) -> Line:
        first, second = numpy.array(a, numpy.int64), numpy.array(b, numpy.int64)
        slope, rest = numpy.divmod(second - first, self.sizes[1] - self.sizes[0])
        if rest.any():
            raise NotRecordable("sizes that do not grow evenly")
        return Line(self.sizes[0], first, slope)

    def _input_refs(self) -> list[tuple[Ref, Ref]]:
        refs = [[one.recorder.ref(t) for t in one.inputs] for one in (self.a, self.b)]
        return list(zip(*refs, strict=True))

    def _result_ref(self) -> tuple[Ref, Ref]:
        return self.a.recorder.ref(self.a.result), self.b.recorder.ref(self.b.result)

    def _lay_out(self) -> tuple[dict[Pair, Pair], Pair]:
        """(where each storage lies, bytes in all): memory is used again after its last use.

        Not within steps that are done together, where one thread is ahead of another.
        """
        used = [
            {
                (x.storage, y.storage)
                for first, second in self.pairs[unit.begin : unit.end]
                for x, y in zip(first.refs, second.refs, strict=True)
                if x.is_dynamic
            }
            for unit in self.units
        ]
        for shown in self.shown:  # still there when it is shown
            used[self._unit_of(shown[0])] |= {
                (x.storage, y.storage) for x, y in self._shown_refs(*shown)
            }
        last = {pair: i for i, pairs in enumerate(used) for pair in pairs}
        forever = [(x.storage, y.storage) for x, y in [*self._input_refs(), self._result_ref()]]
        places: dict[Pair, Pair] = {}
        free: dict[Pair, list[Pair]] = {}
        end = (0, 0)
        for i, pairs in enumerate([set(forever), *used], -1):
            for pair in sorted(pairs - places.keys()):
                length = self._length(pair)
                if free.get(length):
                    places[pair] = free[length].pop()
                else:
                    places[pair], end = end, (end[0] + length[0], end[1] + length[1])
            for pair in sorted(pairs - set(forever)):
                if last[pair] == i:
                    free.setdefault(self._length(pair), []).append(places[pair])
        return places, end

    def _length(self, pair: Pair) -> Pair:
        """Bytes; what is fixed and what grows are rounded up apart, so that they stay on a line."""
        try:
            a, b = self.a.recorder.sizes[pair[0]], self.b.recorder.sizes[pair[1]]
        except KeyError:
            raise NotRecordable("tensors that are constant for one size only") from None
        slope, rest = divmod(b - a, self.sizes[1] - self.sizes[0])
        if rest or slope < 0:
            raise NotRecordable("sizes that do not grow evenly")
        fixed = _rounded(max(a - slope * self.sizes[0], 0))
        return fixed + _rounded(slope) * self.sizes[0], fixed + _rounded(slope) * self.sizes[1]

    def _place(self, pair: tuple[Ref, Ref]) -> Pair:
        place = self.places[pair[0].storage, pair[1].storage]
        return place[0] + pair[0].offset, place[1] + pair[1].offset

    def _address(self, pair: tuple[Ref, Ref]) -> tuple[Pair, bool]:
        """(address for each size, whether it counts from the beginning of the memory)."""
        x, y = pair
        if x.is_dynamic != y.is_dynamic:
            raise NotRecordable("tensors that are constant for one size only")
        if x.is_dynamic:
            return self._place(pair), True
        if x.tensor.data_ptr() != y.tensor.data_ptr() and not torch.equal(x.tensor, y.tensor):
            raise NotRecordable("constants that depend on the size")
        self.kept.append(x.tensor)
        return (x.tensor.data_ptr(), x.tensor.data_ptr()), False

    def _add_step(self, a: Recorded, b: Recorded, lines: Lines | None) -> int:
        if a.number != b.number or type(a.call) is not type(b.call):
            raise NotRecordable("numbers that depend on the size")
        sizes: Any = (*a.sizes, 1, 1, 1), (*b.sizes, 1, 1, 1)
        strides: Any = [[(0,) * DIMENSIONS] * len(a.refs)] * 2
        if lines or a.op not in KERNELS:
            lines = lines or plain_lines(a, b)
            sizes, strides = lines.sizes, lines.strides
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
        address, is_place = self._address(pair)
        if is_place:
            self.steps.places.append(at)
        else:
            self.constants.append((0, at, len(self.kept) - 1))
        words = zip((self.steps.a, self.steps.b), address, strides, strict=True)
        for of, where, each in words:
            of[at : at + 2 + DIMENSIONS] = [where, *each, kind]

    def _add_call(self, a: Recorded, b: Recorded, step: int) -> None:
        start = self.calls.add(_as_words(a.call), _as_words(b.call))
        word = step + Step.call.offset // WORD
        self._set(self.steps, word, (start * WORD, start * WORD))
        self.steps.calls.append(word)
        for name, pair in zip(a.fields, zip(a.refs, b.refs, strict=True), strict=True):
            at = start + getattr(type(a.call), name).offset // WORD
            if (index := self.cache.get(pair[0].storage)) is not None:
                strides = getattr(type(a.call), f"{name}_strides").offset // WORD
                self.cache_words.append((at, start + strides, index))
                for i in range(3):
                    self._set(self.calls, start + strides + i, (0, 0))
                self._set(self.calls, at, (0, 0))
                continue
            address, is_place = self._address(pair)
            self._set(self.calls, at, address)
            if is_place:
                self.calls.places.append(at)
            else:
                self.constants.append((1, at, len(self.kept) - 1))

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
    """The words of a step with so many operands, which are not filled in.

    Asked again for every layer of a model, and they are all alike.
    """
    step = Step(op=OPS.index(op), operands=count, scalar=number)
    step.sizes = sizes
    return _as_words(step)
