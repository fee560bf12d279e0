"""A recorded forward pass for any number of tokens, run with one native call."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from transformers_api.kernels.abi import Library, RowChange
from transformers_api.kernels.capture import Recorder, record
from transformers_api.kernels.graph.adapted import adapted_plan
from transformers_api.kernels.graph.hook_points import HookPoints
from transformers_api.kernels.graph.planner import Affine, HookPoint, Plan, Recording, make_plan
from transformers_api.kernels.graph.tiling import NotRecordable

log = logging.getLogger(__name__)
PAGE = 4096


class RecordedPass:
    """Forward passes of one kind, of any ``size``: a number of tokens.

    ``record`` two passes of different sizes; from then on ``run`` returns what the model would, and
    ``failure`` is the reason where that is not possible.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.failure = ""
        self._recordings: list[Recording] = []
        self._program: Program | None = None
        self._adapted: Program | None = None

    @property
    def is_ready(self) -> bool:
        """True once ``run`` may be called."""
        return self._program is not None

    @property
    def plan(self) -> Plan:
        """The plan that ``run`` executes. Only when it is ready."""
        assert self._program is not None
        return self._program.plan

    def use_plan(self, plan: Plan) -> None:
        """Be ready without a recording."""
        self._program = Program(self.library, plan)

    def add_adapters(self, tables: Mapping[int, int]) -> None:
        """Let ``run`` take adapters; ``tables`` see ``adapted_plan``. Only when it is ready."""
        self._adapted = Program(self.library, adapted_plan(self.plan, tables))

    def record(
        self, size: int, inputs: list[Tensor], cache: list[Tensor], forward: Callable[[], Tensor]
    ) -> None:
        """Record how ``forward`` computes its result from ``inputs``, without matrix products.

        ``cache``: the tensors of keys and values, all rows, layer by layer.
        """
        with record(inputs) as recorder:
            result = forward()
        self.add(size, recorder, inputs, result, cache)

    def add(
        self,
        size: int,
        recorder: Recorder,
        inputs: list[Tensor],
        result: Tensor,
        cache: list[Tensor],
    ) -> None:
        """Take what ``recorder`` has recorded of a pass; see ``record``."""
        self._recordings.append(Recording(size, recorder, inputs, result))
        if len(self._recordings) == 2 and not self.failure:
            try:
                first, second = self._recordings
                self._program = Program(self.library, make_plan(first, second, cache))
            except NotRecordable as error:
                self.failure = str(error)
                log.info("Forward passes are not recorded: %s", error)
            self._recordings = []

    def run(
        self,
        size: int,
        inputs: list[Tensor],
        cache: list[Tensor],
        observer: PassObserver | None = None,
        adapters: Tensor | None = None,
    ) -> Tensor:
        """The result, valid until the next call.

        ``observer`` is shown the calls that it chose while the pass is paused. ``adapters`` (size,)
        int64: the number of each token's adapter, or -1; None: no token has any.
        """
        program = self._program if adapters is None else self._adapted
        assert program is not None
        return program.run(size, inputs, cache, observer, adapters)

    def release_memory(self) -> None:
        """Give the memory of the last run back, and the way to take adapters."""
        if self._program is not None:
            self._program.release_memory()
        self._adapted = None


@dataclass(frozen=True, slots=True)
class FinishedCall:
    """A module call that the pass has just completed: see capture.ModuleCall.

    ``cached``: indices of its key and value in the cache.
    """

    module: Any
    tensors: list[Tensor]
    cached: tuple[int, int] | None
    options: dict[str, Any]


class PassObserver(Protocol):
    """An observer of a pass. The tensors of a call are overwritten when the pass continues."""

    def choose(self, points: HookPoints) -> list[HookPoint]:
        """The hook points to pause at, in order."""
        ...

    def changes(self, call: FinishedCall, at: int) -> list[RowChange] | None:
        """Changes and copies of its rows after ``at`` steps, in place of a pause; None: pause."""
        ...

    def show(self, call: FinishedCall) -> None:
        """Observe a call."""
        ...

    def finish(self) -> None:
        """The pass has ended; what it wrote into the cache is there."""
        ...


class Program:
    """A plan with memory. Addresses and sizes are computed when the size or the cache changes."""

    def __init__(self, library: Library, plan: Plan) -> None:
        self.library = library
        self.plan = plan
        self._hook_points = HookPoints(plan.hook_points)
        self._calls = plan.calls.at(plan.size)
        self._steps = plan.steps.at(plan.size)
        self._memory = torch.zeros(0, dtype=torch.uint8)
        self._size = 0
        self._finished: dict[int, FinishedCall] = {}  # by id of the hook point, for this size
        self._bound_cache: Any = None

    def run(
        self,
        size: int,
        inputs: list[Tensor],
        cache: list[Tensor],
        observer: PassObserver | None,
        adapters: Tensor | None = None,
    ) -> Tensor:
        """See RecordedPass."""
        if size != self._size:
            self._resize(size)
        key = [tensor.data_ptr() for tensor in cache], [tensor.stride() for tensor in cache[:1]]
        if key != self._bound_cache:
            self._bind_cache(cache)
            self._bound_cache = key
        if adapters is not None:
            self._steps[self.plan.adapter_words] = adapters.data_ptr()
        base = self._base
        for offset, tensor in zip(self._inputs, inputs, strict=True):
            ctypes.memmove(base + int(offset), tensor.data_ptr(), tensor.nbytes)
        done, total = 0, len(self._steps) // self.plan.width
        pending: list[RowChange] = []
        if observer:
            for point in observer.choose(self._hook_points):
                call = self._finished_call(point)
                changes = observer.changes(call, point.at)
                if changes is not None:
                    pending += changes
                    continue
                self._run_steps(done, point.at, pending)
                done, pending = point.at, []
                observer.show(call)
        self._run_steps(done, total, pending)
        if observer:
            observer.finish()
        return self._result

    def release_memory(self) -> None:
        """See RecordedPass."""
        self._memory = self._result = torch.zeros(0, dtype=torch.uint8)
        self._size, self._bound_cache, self._finished = 0, None, {}

    def _run_steps(self, begin: int, end: int, changes: Sequence[RowChange] = ()) -> None:
        address = self._steps.ctypes.data + begin * self.plan.width * self._steps.itemsize
        if not changes:
            self.library.without_gil.run_steps(address, end - begin)
            return
        for change in changes:
            change.at -= begin
        array = (RowChange * len(changes))(*changes)
        self.library.without_gil.run_changed_steps(address, end - begin, array, len(changes))

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
        self._steps[plan.step_relocations] += self._base
        self._calls[plan.call_relocations] += self._base
        self._steps[plan.step_call_relocations] += self._calls.ctypes.data
        self._inputs = plan.inputs.at(size)
        self._size, self._bound_cache = size, None
        self._result = self._tensor(plan.result, plan.result_dtype)
        self._finished = {}

    def _finished_call(self, point: HookPoint) -> FinishedCall:
        call = self._finished.get(id(point))
        if call is None:
            pairs = zip(point.tensors, point.dtypes, strict=True)
            tensors = [self._tensor(place, dtype) for place, dtype in pairs]
            call = FinishedCall(point.module, tensors, point.cached, point.options)
            self._finished[id(point)] = call
        return call

    def _tensor(self, place: Affine, dtype: torch.dtype) -> Tensor:
        offset, *shape = (int(n) for n in place.at(self._size))
        sizes, strides = shape[: len(shape) // 2], shape[len(shape) // 2 :]
        start = self._base + offset - self._memory.data_ptr()
        end = start + (len(self._memory) - start) // 8 * 8
        return self._memory[start:end].view(dtype).as_strided(sizes, strides)

    def _bind_cache(self, cache: list[Tensor]) -> None:
        """Point the calls to the cache as it is allocated now."""
        for at, strides_at, index in self.plan.cache_words:
            tensor = cache[index]
            self._calls[at] = tensor.data_ptr()
            self._calls[strides_at : strides_at + 3] = numpy.array(tensor.stride()[:3])
