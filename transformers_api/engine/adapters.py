"""Adapters (LoRA) of a model in memory: read on first use, kept up to a number of bytes.

Base and adapters share one model: an adapter is small matrices beside the model's own, and each
sequence says which one its tokens are to go through. Requesters' threads wait here; whatever
touches torch is a visit of the engine thread, a few megabytes at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from transformers_api.engine.adapter_matrices import GgufMatrices, PeftMatrices
from transformers_api.engine.adapter_source import AdapterLayer, AdapterSource, AdapterStats
from transformers_api.engine.base import (
    NOTHING,
    ContextOverflow,
    Engine,
    EngineFacts,
    EngineListener,
    EngineStats,
    SequenceRequest,
    TokenStream,
)
from transformers_api.engine.dora import Rescaling, rescaled
from transformers_api.engine.pretrained import differentiable
from transformers_api.engine.runners.adapted_modules import adapted, layer_at
from transformers_api.errors import ApiError, InsufficientMemory, ModelLoadFailed, Unavailable

if TYPE_CHECKING:
    from transformers_api.engine.llm_engine import BatchingEngine

T = TypeVar("T")
log = logging.getLogger(__name__)
MIB = 1 << 20
SLICE_BYTES = 4 << 20  # of an adapter, read between two steps
READ_BYTES = 1 << 20  # at once, from the disk
POLL_S = 0.25  # to look whether a requester has gone, while there is no room


class LowRankProduct(Protocol):
    """The addition of an adapter to one layer.

    ``rescaling``: gain and offset (out) of the layer's own outputs before it; None: they stay.
    """

    @property
    def rescaling(self) -> tuple[Tensor, ...] | None:
        """See above."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return what is added for ``x`` (…, in): (…, out)."""
        ...


# (path of a layer, down (rank, in), up (out, rank), rescaling) -> up times down, for that layer.
# Raises ValueError where no pass can add to it.
MakeProduct = Callable[[str, Tensor, Tensor, Rescaling | None], LowRankProduct]


class AdapterRunner(Protocol):
    """The part of a runner that its adapters need."""

    def adapter_maker(self) -> MakeProduct:
        """Return what makes the products of one adapter as the runner wants them."""
        ...

    def drop_adapter(self, adapter: LoadedAdapter) -> None:
        """Hold it no longer."""
        ...


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory. ``products``: what it adds, by the paths of the model's layers."""

    key: Hashable  # the same for the same numbers
    products: Mapping[str, LowRankProduct]

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return sum(product.nbytes for product in self.products.values())


@dataclass
class _Entry:
    name: str
    bytes: int
    users: int = 0
    adapter: LoadedAdapter | None = None  # None: it is being read


class Adapters:
    """The adapters of one engine. Safe from any thread but the engine's."""

    def __init__(
        self, engine: BatchingEngine, runner: Callable[[], AdapterRunner], most_bytes: int
    ) -> None:
        self._engine = engine
        self._runner = runner  # on the engine thread, while the model is there
        self._most_bytes = most_bytes
        self._condition = threading.Condition()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # used last at the end

    def acquire(
        self, source: AdapterSource, timeout: float | None, is_cancelled: Callable[[], bool]
    ) -> LoadedAdapter:
        """Return an adapter that stays in memory until ``release``. See base.Engine.adapted."""
        if source.bytes > self._most_bytes:
            raise InsufficientMemory(
                f"Adapter '{source.name}' has {source.bytes / MIB:.0f} MiB of numbers, and "
                f"MAX_ADAPTERS_MB allows {self._most_bytes / MIB:.0f}"
            )
        until = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            while True:
                entry = self._entries.get(source.key)
                if entry is not None and entry.adapter is not None:
                    entry.users += 1
                    self._entries.move_to_end(source.key)
                    return entry.adapter
                if entry is None and self._make_room(source):
                    entry = self._entries[source.key] = _Entry(source.name, source.bytes, 1)
                    break
                self._wait(source, until, is_cancelled)
        return self._filled(entry, source)

    def release(self, adapter: LoadedAdapter) -> None:
        """Let it go when memory for another one is needed."""
        with self._condition:
            entry = self._entries.get(adapter.key)
            if entry is not None and entry.adapter is adapter:
                entry.users -= 1
            self._condition.notify_all()

    def evict(self, name: str) -> bool:
        """Take an adapter that nobody uses out of memory; False where there is none such."""
        with self._condition:
            keys = [k for k, e in self._entries.items() if e.name == name and not e.users]
            for key in keys:
                self._drop(key)
            return bool(keys)

    def stats(self) -> tuple[AdapterStats, ...]:
        """Those in memory."""
        with self._condition:
            entries = list(self._entries.values())
        return tuple(AdapterStats(e.name, e.bytes, e.users) for e in entries if e.adapter)

    def clear(self) -> None:
        """Forget all, as the model is unloaded."""
        with self._condition:
            self._entries.clear()
            self._condition.notify_all()

    def _filled(self, entry: _Entry, source: AdapterSource) -> LoadedAdapter:
        began = time.monotonic()
        try:
            adapter = self._read(source)
        except BaseException:
            with self._condition:
                self._entries.pop(source.key, None)
                self._condition.notify_all()
            raise
        with self._condition:
            entry.adapter, entry.bytes = adapter, adapter.bytes
            self._condition.notify_all()
        seconds = time.monotonic() - began
        log.info("Read adapter %s (%.1f MB) in %.2f s", source.name, adapter.bytes / 1e6, seconds)
        return adapter

    def _make_room(self, source: AdapterSource) -> bool:
        """Drop what nobody uses: other versions of the same, then those used longest ago."""
        unused = [key for key, entry in self._entries.items() if not entry.users]
        for key in unused:
            if self._entries[key].name == source.name:
                self._drop(key)
        for key in unused:
            if self._used + source.bytes > self._most_bytes and key in self._entries:
                self._drop(key)
        return self._used + source.bytes <= self._most_bytes

    @property
    def _used(self) -> int:
        return sum(entry.bytes for entry in self._entries.values())

    def _drop(self, key: Hashable) -> None:
        adapter = self._entries.pop(key).adapter
        assert adapter is not None
        self._engine.call(lambda _model: self._runner().drop_adapter(adapter))

    def _wait(
        self, source: AdapterSource, until: float | None, is_cancelled: Callable[[], bool]
    ) -> None:
        left = POLL_S if until is None else min(until - time.monotonic(), POLL_S)
        if left <= 0 or is_cancelled():
            raise Unavailable(
                f"Adapter '{source.name}' did not become available: other adapters, which are in "
                "use, fill the memory that MAX_ADAPTERS_MB allows",
                param="model",
                retry_after=5,
            )
        self._condition.wait(left)

    def _read(self, source: AdapterSource) -> LoadedAdapter:
        try:
            _warm(source.weights)
            reading = _Reading(source, self._runner)
            while not reading.is_done:
                self._engine.call(reading.read).result()
        except (KeyError, OSError, SafetensorError, ValueError) as error:
            raise ModelLoadFailed(f"Adapter '{source.name}': {error}", param="model") from error
        return LoadedAdapter(source.key, reading.products)


class _Reading:
    """An adapter on its way into memory, some layers per visit."""

    def __init__(self, source: AdapterSource, runner: Callable[[], AdapterRunner]) -> None:
        self.products: dict[str, LowRankProduct] = {}
        self._left = list(source.layers)
        self._runner = runner
        self._make: MakeProduct | None = None
        self._source = source

    def _open(self, model: Any) -> GgufMatrices | PeftMatrices:
        if self._source.architecture is None:
            return PeftMatrices(self._source.weights)
        return GgufMatrices(self._source, model)

    @property
    def is_done(self) -> bool:
        return not self._left

    def read(self, model: Any) -> None:
        size, make = 0, self._make or self._runner().adapter_maker()
        self._make = make
        with self._open(model) as file, differentiable():
            while self._left and size < SLICE_BYTES:
                layer = file.placed(self._left.pop(0))
                down, up = file.numbers(layer)
                path = _checked(model, layer, down, up)
                up *= layer.scale
                rescaling = None
                if layer.magnitude is not None:
                    lengths = file.vector(layer.magnitude)
                    rescaling = rescaled(model.get_submodule(path), down, up, lengths, path)
                    up *= rescaling[0][:, None]
                    size = SLICE_BYTES  # which reads all of the layer's own weight
                self.products[path] = make(path, down, up, rescaling)
                size += down.nbytes + up.nbytes


def _checked(model: Any, layer: AdapterLayer, down: Tensor, up: Tensor) -> str:
    """The path of the layer in this model. Raises ValueError where the tensors do not fit it."""
    path, sizes = layer_at(model, layer.path)
    if (down.shape[1], up.shape[0]) != sizes:
        raise ValueError(
            f"{layer.down} and {layer.up} are for a layer of {down.shape[1]} inputs and "
            f"{up.shape[0]} outputs, and {path} of the base has {sizes[0]} and {sizes[1]}"
        )
    for name, tensor in ((layer.down, down), (layer.up, up)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has numbers that are not finite")
    return path


def _warm(path: Path) -> None:
    """Read a file on this thread, so that the engine's waits for no disk."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ_BYTES)
        while file.readinto(buffer):
            pass


class AdaptedEngine:
    """Meets ``base.Engine``: a model with an adapter, until ``close`` gives that back."""

    def __init__(
        self,
        engine: BatchingEngine,
        adapter: LoadedAdapter,
        release: Callable[[LoadedAdapter], None],
        listener: EngineListener | None,
    ) -> None:
        self._engine = engine
        self._adapter = adapter
        self._release: Callable[[LoadedAdapter], None] | None = release
        self._listener = listener
        self._lock = threading.Lock()

    @property
    def max_model_len(self) -> int:
        """See base.Engine."""
        return self._engine.max_model_len

    @property
    def context_overflow(self) -> ContextOverflow:
        """See base.Engine."""
        return self._engine.context_overflow

    @property
    def vocab_size(self) -> int:
        """See base.Engine."""
        return self._engine.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See base.Engine."""
        return self._engine.eos_token_ids

    def submit(
        self, requests: Sequence[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        """See base.Engine."""
        adapter, listener = self._adapter, self._listener
        own = [replace(each, adapter=adapter, listener=listener) for each in requests]
        return self._engine.submit(own, observe=observe)

    def call(self, visit: Callable[[Any], T]) -> Future[T]:
        """See base.Engine."""

        def run(model: Any) -> T:
            with adapted(model, [self._adapter]):
                return visit(model)

        return self._engine.call(run)

    def adapted(
        self,
        source: AdapterSource,
        *,
        listener: EngineListener | None = None,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> Engine:
        """See base.Engine. The other adapter is in the place of this one."""
        return self._engine.adapted(
            source, listener=listener, timeout=timeout, is_cancelled=is_cancelled
        )

    def evict_adapter(self, name: str) -> bool:
        """See base.Engine."""
        return self._engine.evict_adapter(name)

    def describe(self) -> EngineFacts:
        """See base.Engine."""
        return self._engine.describe()

    def stats(self) -> EngineStats:
        """See base.Engine."""
        return self._engine.stats()

    def close(self, error: ApiError | None = None) -> None:
        """Give the adapter back."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release(self._adapter)
