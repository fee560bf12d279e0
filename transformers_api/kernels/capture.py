"""Graph capture: a forward pass as a list of operations over memory, recorded once.

A model of small layers spends more time between its matrix products than in them, in Python and in
torch's dispatcher. A decode step does the same every time; so the first one of its kind is recorded
operation by operation, and graph/ turns it into one native call. Nothing here knows a model: one
with an operation that is not in the tables of operations.py is not captured and runs as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_api.kernels.operations import translate

ALLOCATIONS = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"}
CONSTANTS = {"aten.zeros.default": 0.0, "aten.ones.default": 1.0}
VIEWS = {"aten._unsafe_view.default"}  # which their schemas do not say


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor as an operand. ``is_dynamic``: computed in the pass, or one of its inputs."""

    tensor: Tensor
    is_dynamic: bool
    storage: int  # address of its memory, which identifies it
    offset: int  # bytes from there


@dataclass(slots=True)
class Operation:
    """One operation.

    ``call`` is a kernel's argument: the address of a Weight, or an Attention or a CacheWrite. The
    operands are then those of its ``fields``, some of them parts of the KV cache.
    """

    op: str
    refs: list[Ref]  # inputs, then the result if there is one
    sizes: tuple[int, ...]
    number: float = 0.0
    call: Any = None
    fields: tuple[str, ...] = ()


@dataclass(slots=True)
class ModuleCall:
    """A module's call that hooks may observe; ``options`` are its other arguments.

    ``tensors`` are computed in the pass and stay alive until the hooks ran. ``key`` and ``value``
    are parts of the KV cache. ``at``: the number of operations before the call.
    """

    module: Any
    tensors: list[Tensor]
    at: int
    key: Tensor | None = None
    value: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


_current: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


def current() -> Recorder | None:
    """The active recorder of this thread."""
    return _current.get()


@contextlib.contextmanager
def record(inputs: list[Tensor]) -> Iterator[Recorder]:
    """Record the operations of the block; see Recorder."""
    recorder = Recorder(inputs)
    token = _current.set(recorder)
    try:
        with recorder:
            yield recorder
    finally:
        _current.reset(token)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a forward pass. ``inputs`` are the tensors that differ from step to step.

    ``failure`` names an operation that cannot be recorded; the pass itself is not disturbed.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Operation] = []
        self.module_calls: list[ModuleCall] = []
        self.sizes: dict[int, int] = {}  # bytes of each dynamic storage
        self.alive: list[Tensor] = []  # so that no storage is reused meanwhile
        self.untranslated: dict[int, str] = {}  # storages written by unsupported operations
        self.failure = ""  # an operation that the native program lacks
        # Tensors of this pass that nothing has been written into, and the value that fills them.
        self.fresh: dict[int, tuple[Tensor, float | None]] = {}
        self.repeated: dict[int, Tensor] = {}  # storages whose lines are one number of these (…, 1)
        for tensor in inputs:
            self._produces(tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch's compiler is not loaded, so there is nothing to keep out."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind.decomposes:
            with self:
                return func.decompose(*args, **kwargs)
        if types:  # tensors without numbers: what stands for the operation is recorded
            with self:
                return types[0].__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **kwargs)
        self._record(kind, args, kwargs, out)
        return out

    def ref(self, tensor: Tensor) -> Ref:
        """The tensor as an operand."""
        storage = tensor.untyped_storage().data_ptr()
        if storage in self.untranslated:
            self.failure = self.failure or self.untranslated[storage]
        self.alive.append(tensor)
        return Ref(tensor, storage in self.sizes, storage, tensor.data_ptr() - storage)

    def add(
        self,
        op: str,
        out: Tensor | None,
        inputs: list[Tensor],
        sizes: tuple[int, ...],
        number: float = 0.0,
        call: Any = None,
        fields: tuple[str, ...] = (),
    ) -> None:
        """Append an operation; see Operation. None where there is nothing to compute."""
        if 0 in sizes:  # torch gives a tensor without elements no address
            if out is not None:
                self._produces(out)
            return
        refs = [self.ref(tensor) for tensor in inputs]
        if out is not None:
            self._produces(out)
            refs.append(self.ref(out))
        self.steps.append(Operation(op, refs, tuple(sizes), number, call, fields))

    def add_module_call(self, module: Any, tensors: list[Tensor], **details: Any) -> None:
        """Note a call that others may want to see; see ModuleCall."""
        self.module_calls.append(ModuleCall(module, tensors, len(self.steps), **details))

    def copy(self) -> Recorder:
        """A recorder of the same operations so far."""
        other = Recorder([])
        other.steps, other.module_calls, other.alive = (
            list(self.steps),
            list(self.module_calls),
            list(self.alive),
        )
        other.sizes, other.untranslated = dict(self.sizes), dict(self.untranslated)
        other.failure, other.fresh = self.failure, dict(self.fresh)
        other.repeated = dict(self.repeated)
        return other

    def is_written(self, tensor: Tensor) -> bool:
        """True for a tensor that the program itself makes, and its rows lie one after the other."""
        return tensor.untyped_storage().data_ptr() in self.sizes and tensor.is_contiguous()

    def is_dynamic(self, tensor: Tensor) -> bool:
        """True for a tensor that depends on the inputs."""
        storage = tensor.untyped_storage().data_ptr()
        return storage in self.sizes or storage in self.untranslated

    def _produces(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        self.alive.append(tensor)

    def _record(self, kind: _Kind, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        results = [out] if isinstance(out, Tensor) else _tensors(out)
        if kind.makes_memory:
            self.alive += results
            value = CONSTANTS.get(kind.name)
            self.fresh |= {t.untyped_storage().data_ptr(): (t, value) for t in results}
            return
        operands = _tensors((*args, *kwargs.values()) if kwargs else args)
        if not any(self.is_dynamic(tensor) for tensor in operands):
            self.alive += results
            if kind.is_mutable:
                self.fresh.pop(args[0].untyped_storage().data_ptr(), None)
            return
        if kind.is_view:
            return
        if kind.is_mutable:
            self._begin_writing(args[0])
        if reason := self._untranslated(operands):  # which nobody may ever read
            self.alive += results
            self.untranslated |= {t.untyped_storage().data_ptr(): reason for t in results}
            if not results:
                self.failure = self.failure or reason
            return
        is_static = kind.is_mutable and not self.is_dynamic(args[0])
        if is_static or not translate(self, kind.plain_name, args, kwargs, out):
            self.alive += results
            self.untranslated |= {t.untyped_storage().data_ptr(): kind.name for t in results}
            if is_static or not results:
                self.failure = self.failure or kind.name

    def _untranslated(self, operands: list[Tensor]) -> str:
        """The operation that the native program lacks for one of these operands; else ""."""
        if not self.untranslated:
            return ""
        storages = (tensor.untyped_storage().data_ptr() for tensor in operands)
        return next((self.untranslated[s] for s in storages if s in self.untranslated), "")

    def _begin_writing(self, tensor: Tensor) -> None:
        """Let a tensor that was made in the pass be computed in it from now on."""
        made = self.fresh.pop(tensor.untyped_storage().data_ptr(), None)
        if made is None or self.is_dynamic(tensor):
            return
        whole, value = made
        if value is None:
            self._produces(whole)
        else:
            self.add("copy", whole, [torch.full((1,), value)], tuple(whole.shape))


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested lists of values."""
    tensors: list[Tensor] = []
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += _tensors(value)
    return tensors


@dataclass(frozen=True, slots=True)
class _Kind:
    """Properties of one of torch's operations, cached: a look-up costs more than the operation.

    ``plain_name``: of the operation that returns its result, where it writes into an operand.
    """

    operation: Any
    name: str
    plain_name: str
    makes_memory: bool
    decomposes: bool
    is_mutable: bool
    is_view: bool  # the results share the first argument's memory


_kinds: dict[int, _Kind] = {}  # by an operation's address, which is its own while it is in here


def _kind(func: Any) -> _Kind:
    kind = _kinds.get(id(func))
    return kind or _kinds.setdefault(id(func), _kind_of(func))


def _kind_of(func: Any) -> _Kind:
    aliases = [r.alias_info for r in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    name, is_mutable = str(func), func._schema.is_mutable
    return _Kind(
        func,
        name,
        name.replace("_.", ".") if is_mutable else name,
        name in ALLOCATIONS or name in CONSTANTS,
        func._can_decompose(),
        is_mutable,
        is_view or name in VIEWS,
    )
