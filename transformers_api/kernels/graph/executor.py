"""A recorded forward pass for any number of tokens, run with one native call."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from transformers_api.kernels.abi import Library
from transformers_api.kernels.capture import Recorder, record
from transformers_api.kernels.graph.planner import Learned, Line, Plan, View, make_plan
from transformers_api.kernels.graph.tiling import NotRecordable

log = logging.getLogger(__name__)
PAGE = 4096


class RecordedPass:
    """Forward passes of one kind, as prompts or decode steps, of any ``size``.

    ``learn`` two passes of different sizes; from then on ``run`` gives what the model would, and
    ``refused`` says why if that cannot be had. The size is what differs: rows, or tokens.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.refused = ""
        self._learned: list[Learned] = []
        self._program: Program | None = None

    @property
    def is_ready(self) -> bool:
        """Whether ``run`` may be called."""
        return self._program is not None

    @property
    def plan(self) -> Plan:
        """What ``run`` does. Only when it is ready."""
        assert self._program is not None
        return self._program.plan

    def know(self, plan: Plan) -> None:
        """Be ready without having learned."""
        self._program = Program(self.library, plan)

    def learn(
        self,
        size: int,
        inputs: list[Tensor],
        cache: list[Tensor],
        forward: Callable[[], Tensor],
        begun: Recorder | None = None,
    ) -> None:
        """Record how ``forward`` makes its result of ``inputs``; products are not computed for it.

        ``cache``: the tensors of keys and values, all rows, layer by layer. ``begun`` has recorded
        a pass up to where ``forward`` goes on.
        """
        with record(inputs, begun) as recorder:
            result = forward()
        self._learned.append(Learned(size, recorder, inputs, result))
        if len(self._learned) == 2 and not self.refused:
            try:
                first, second = self._learned
                self._program = Program(self.library, make_plan(first, second, cache))
            except NotRecordable as error:
                self.refused = str(error)
                log.info("Forward passes are not recorded: %s", error)
            self._learned = []

    def run(
        self,
        size: int,
        inputs: list[Tensor],
        cache: list[Tensor],
        first: int,
        watch: Watch | None = None,
    ) -> Tensor:
        """The result, until the next call. ``first``: the cache's row of the pass's first row.

        ``watch`` is shown what it wants to see while the pass stands still.
        """
        assert self._program is not None
        return self._program.run(size, inputs, cache, first, watch)

    def rest(self) -> None:
        """Give the memory of the last run back."""
        if self._program is not None:
            self._program.rest()


@dataclass(frozen=True, slots=True)
class Seen:
    """A call that the pass has just done: see recorder.Shown.

    ``cached``: which tensors of the cache are its key and value.
    """

    module: Any
    tensors: list[Tensor]
    cached: tuple[int, int] | None
    options: dict[str, Any]


class Watch(Protocol):
    """Who looks at a pass. What it is shown is overwritten when the pass goes on."""

    def wanted(self, views: list[View]) -> list[View]:
        """Which of these calls are to be shown."""
        ...

    def show(self, seen: Seen) -> None:
        """See the call."""
        ...


class Program:
    """A plan with memory. Addresses and sizes are worked out when the size or the cache changes."""

    def __init__(self, library: Library, plan: Plan) -> None:
        self.library = library
        self.plan = plan
        self._calls = plan.calls.at(plan.size)
        self._steps = plan.steps.at(plan.size)
        self._memory = torch.zeros(0, dtype=torch.uint8)
        self._size = 0
        self._seen: dict[int, Seen] = {}  # by the view's id, for this size
        self._cache: Any = None

    def run(
        self,
        size: int,
        inputs: list[Tensor],
        cache: list[Tensor],
        first: int,
        watch: Watch | None,
    ) -> Tensor:
        """See RecordedPass."""
        if size != self._size:
            self._resize(size)
        where = first, [tensor.data_ptr() for tensor in cache], cache[0].stride()
        if where != self._cache:
            self._aim(cache, first)
            self._cache = where
        base = self._base
        for place, given in zip(self._inputs, inputs, strict=True):
            ctypes.memmove(base + int(place), given.data_ptr(), given.nbytes)
        done = 0
        if watch:
            for view in watch.wanted(self.plan.views):
                self._go_on(done, view.at)
                done = view.at
                watch.show(self._look(view))
        self._go_on(done, len(self._steps) // self.plan.width)
        return self._result

    def rest(self) -> None:
        """See RecordedPass."""
        self._memory = self._result = torch.zeros(0, dtype=torch.uint8)
        self._size, self._cache, self._seen = 0, None, {}

    def _go_on(self, begin: int, end: int) -> None:
        address = self._steps.ctypes.data + begin * self.plan.width * self._steps.itemsize
        self.library.without_gil.run_steps(address, end - begin)

    @property
    def _base(self) -> int:
        return self._memory.data_ptr() + -self._memory.data_ptr() % PAGE

    def _resize(self, size: int) -> None:
        plan = self.plan
        bytes_needed = int(plan.memory.at(size)[0]) + PAGE
        if bytes_needed > len(self._memory):
            self._memory = torch.zeros(bytes_needed, dtype=torch.uint8)
        self._steps[:] = plan.steps.at(size)
        self._calls[:] = plan.calls.at(size)
        self._steps[plan.step_places] += self._base
        self._calls[plan.call_places] += self._base
        self._steps[plan.step_calls] += self._calls.ctypes.data
        self._inputs = plan.inputs.at(size)
        self._size, self._cache = size, None
        self._result = self._tensor(plan.result, torch.float32)
        self._seen = {}

    def _look(self, view: View) -> Seen:
        seen = self._seen.get(id(view))
        if seen is None:
            tensors = [self._tensor(*each) for each in zip(view.tensors, view.dtypes, strict=True)]
            seen = self._seen[id(view)] = Seen(view.module, tensors, view.cached, view.options)
        return seen

    def _tensor(self, line: Line, dtype: torch.dtype) -> Tensor:
        place, *shape = (int(n) for n in line.at(self._size))
        sizes, strides = shape[: len(shape) // 2], shape[len(shape) // 2 :]
        start = self._base + place - self._memory.data_ptr()
        end = start + (len(self._memory) - start) // 8 * 8
        return self._memory[start:end].view(dtype).as_strided(sizes, strides)

    def _aim(self, cache: list[Tensor], first: int) -> None:
        """Point the calls to rows ``first``.. of the cache as it is allocated now."""
        for at, strides_at, index in self.plan.cache_words:
            tensor = cache[index]
            self._calls[at] = tensor.data_ptr() + first * tensor.stride(0) * tensor.element_size()
            self._calls[strides_at : strides_at + 3] = numpy.array(tensor.stride()[:3])
