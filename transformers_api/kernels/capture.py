"""Graph capture: a forward pass as a list of operations over memory, recorded once.

A model of small layers spends more time between its matrix products than in them, in Python and in
torch's dispatcher. A decode step does the same every time; so the first one of its kind is recorded
operation by operation, and graph/ turns it into one native call. Nothing here knows a model: one
with an operation that is not in the tables below is not captured and runs as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COPY = "aten.copy.default"
UNARY = {
    COPY: "copy",
    "aten.clone.default": "copy",
    "aten._to_copy.default": "copy",
    "aten.neg.default": "neg",
    "aten.rsqrt.default": "rsqrt",
    "aten.sqrt.default": "sqrt",
    "aten.exp.default": "exp",
    "aten.tanh.default": "tanh",
    "aten.silu.default": "silu",
    "aten.sigmoid.default": "sigmoid",
    "aten.relu.default": "relu",
    "aten.cos.default": "cos",
    "aten.sin.default": "sin",
}
BINARY = {
    f"aten.{op}.{kind}": op for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")
}
ALLOCATIONS = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"}


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
        if _kind(func).decomposes:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
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
        """Append an operation; see Operation."""
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
        other.failure = self.failure
        return other

    def is_dynamic(self, tensor: Tensor) -> bool:
        """True for a tensor that depends on the inputs."""
        storage = tensor.untyped_storage().data_ptr()
        return storage in self.sizes or storage in self.untranslated

    def _produces(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        self.alive.append(tensor)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        results = _tensors(out)
        if not any(self.is_dynamic(tensor) for tensor in _tensors((args, *kwargs.values()))):
            self.alive += results
            return
        kind = _kind(func)
        if kind.name in ALLOCATIONS or kind.is_view:
            return
        name = kind.name.replace("_.", ".") if kind.is_mutable else kind.name
        is_static = kind.is_mutable and not self.is_dynamic(args[0])
        if is_static or not _translate(self, name, args, kwargs, out):
            self.alive += results
            self.untranslated |= {t.untyped_storage().data_ptr(): kind.name for t in results}
            if is_static or not results:
                self.failure = self.failure or kind.name


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
    """Properties of one of torch's operations, cached: a look-up costs more than the operation."""

    name: str
    decomposes: bool
    is_mutable: bool
    is_view: bool  # the results share the first argument's memory


@functools.cache
def _kind(func: Any) -> _Kind:
    aliases = [r.alias_info for r in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return _Kind(str(func), func._can_decompose(), func._schema.is_mutable, is_view)


def _translate(
    recorder: Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> bool:
    if name in UNARY:
        recorder.add(UNARY[name], out, [args[-1 if name == COPY else 0]], tuple(out.shape))
    elif name in BINARY:
        _binary(recorder, BINARY[name], args, kwargs.get("alpha", 1), out)
    elif name in SPECIAL:
        return SPECIAL[name](recorder, args, kwargs, out)
    else:
        return False
    return True


def _binary(recorder: Recorder, op: str, args: tuple[Any, ...], alpha: float, out: Tensor) -> None:
    operands = [a if isinstance(a, Tensor) else torch.full((1,), float(a)) for a in args[:2]]
    recorder.add(op, out, operands, tuple(out.shape), float(alpha))


def _power(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, exponent = args
    if exponent not in (2, 3):
        return False
    recorder.add(*(("mul", out, [x, x]) if exponent == 2 else ("cube", out, [x])), tuple(out.shape))
    return True


def _mean(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, dims = args[0], args[1]
    if [d % x.dim() for d in dims] != [x.dim() - 1] or not (args[2:] or [False])[0]:
        return False
    recorder.add("mean", out, [x], tuple(x.shape))
    return True


def _concatenate(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    at = 0
    for tensor in tensors:
        if tensor.dim() < out.dim():  # torch joins an empty (0,) to anything
            continue
        part = out.narrow(dim, at, tensor.shape[dim])
        recorder.add("copy", part, [tensor], tuple(part.shape))
        at += tensor.shape[dim]
    return True


def _outer_product(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    a, b = args  # (B, n, 1) and (B, 1, m): how rotary embeddings multiply positions
    if a.shape[2] != 1:
        return False
    recorder.add("mul", out, [a, b], tuple(out.shape))
    return True


def _layer_norm(recorder: Recorder, args: Any, kwargs: Any, out: Any) -> bool:
    x, shape, weight, bias, epsilon = args
    if len(shape) != 1 or (weight is None and bias is not None) or not x.is_contiguous():
        return False
    inputs = [t for t in (x, weight, bias) if t is not None]
    recorder.add("layer_norm", out[0], inputs, tuple(x.shape), epsilon)
    return True


def _embedding(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    table, numbers = args[:2]
    if not table.is_contiguous():
        return False
    recorder.add("gather", out, [numbers, table], tuple(out.shape), float(len(table)))
    return True


def _gelu(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    op = "gelu_tanh" if kwargs.get("approximate", "none") == "tanh" else "gelu"
    recorder.add(op, out, [args[0]], tuple(out.shape))
    return True


SPECIAL: dict[str, Callable[[Recorder, Any, Any, Any], bool]] = {
    "aten.pow.Tensor_Scalar": _power,
    "aten.mean.dim": _mean,
    "aten.cat.default": _concatenate,
    "aten.bmm.default": _outer_product,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.embedding.default": _embedding,
    "aten.gelu.default": _gelu,
}
