"""The resident model, the callers that wait, and the leases that keep a model where it is.

``Residency``, ``Waiter``, ``SwapRequest`` and ``RecentErrors`` belong to the swapper: they change
only while its condition is held.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol

from transformers_api.engine.base import EngineStats
from transformers_api.errors import (
    ApiError,
    ModelLoadFailed,
    ModelUnloaded,
    ServerShuttingDown,
)
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, Source
from transformers_api.serving.swap.history import SwapEvent
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.replica_status import ReplicaStatus

log = logging.getLogger(__name__)

QUIET_S = 1.0  # a model that was idle for so long is not in demand
MOST_CLIENTS = 64  # that are told apart
STAY_S = 0.5  # a model that others have paid for is kept, at least, or ten times its load time

State = Literal["empty", "loading", "ready", "draining"]
# Of a model that comes: its files are fetched or converted; it waits for its turn; it is read.
Stage = Literal["preparing", "waiting", "loading"]


class ModelResolver(Protocol):
    """The part of the registry that the swapper needs."""

    def resolve(self, model_id: str) -> ModelSpec:
        """The entry of an id or alias. Raises ModelNotFound."""
        ...


class SwapperListener(Protocol):
    """Hears of loads and evictions, on the swapper's threads; subclasses override what they need.

    What a listener raises is logged and does no harm.
    """

    def on_load(self, model_id: str, seconds: float) -> None:
        """A model has become resident."""
        return

    def on_evict(self, model_id: str) -> None:
        """A model has gone and its memory was given back."""
        return

    def on_load_failed(self, model_id: str, error: ApiError) -> None:
        """A model could not be prepared or loaded."""
        return


class SilentListener(SwapperListener):
    """Does nothing."""


class Listeners(SwapperListener):
    """Several, told in turn."""

    def __init__(self, *listeners: SwapperListener) -> None:
        self._listeners = listeners

    def on_load(self, model_id: str, seconds: float) -> None:
        """See SwapperListener."""
        for listener in self._listeners:
            listener.on_load(model_id, seconds)

    def on_evict(self, model_id: str) -> None:
        """See SwapperListener."""
        for listener in self._listeners:
            listener.on_evict(model_id)

    def on_load_failed(self, model_id: str, error: ApiError) -> None:
        """See SwapperListener."""
        for listener in self._listeners:
            listener.on_load_failed(model_id, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapperStatus:
    """A snapshot. Advisory: never branch a mutation on it."""

    state: State  # draining: no model grants leases, the one that did is on its way out
    model: str | None = None  # the resident or draining model, and its facts
    device: str | None = None
    dtype: str | None = None
    quantization: str = "none"
    weights: Mapping[str, str] = field(default_factory=dict)  # of a GGUF file: see weight_fidelity
    kernels: str | None = None
    isa: str = ""
    bytes: int = 0
    load_s: float = 0.0
    since: float = 0.0  # when it became resident, by the swapper's clock
    engine: EngineStats = field(default_factory=EngineStats)
    max_model_len: int | None = None
    leases: int = 0
    loading: str | None = None  # the model that is being prepared or loaded
    loading_since: float = 0.0  # when it was asked for; seconds since 1970
    stage: Stage = "waiting"
    last_load_s: float | None = None  # what its last load took
    progress: float = 0.0  # 0..1
    progress_text: str = ""
    waiting: Mapping[str, int] = field(default_factory=dict)  # callers by model
    last_errors: Mapping[str, str] = field(default_factory=dict)  # by model, until it loads
    swaps: Sequence[SwapEvent] = ()  # the last ones, the newest at the end
    replicas: Sequence[ReplicaStatus] = ()  # in a cluster: the snapshot is of all of them

    def holds(self, name: str) -> bool:
        """True where a model is in memory, or an adapter beside its base."""
        if self.replicas:
            return any(each.swapper.holds(name) for each in self.replicas)
        return name == self.model or any(name == each.name for each in self.engine.adapters)


class Lease:
    """The promise that a model stays resident until ``release``. Also a context manager."""

    def __init__(self, model: LoadedModel, let_go: Callable[[], None]) -> None:
        self._model: LoadedModel | None = model
        self._let_go = let_go
        self._lock = threading.Lock()

    @property
    def model(self) -> LoadedModel:
        """The resident model. Not after release: a released lease keeps nothing alive."""
        if self._model is None:
            raise RuntimeError("this lease was released")
        return self._model

    def release(self) -> None:
        """Let the model go. Idempotent, from any thread."""
        with self._lock:
            model, self._model = self._model, None
        if model is not None:
            self._let_go()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Residency:
    """A model in memory, and who holds it there."""

    def __init__(self, model: LoadedModel, target: SwapRequest, now: float) -> None:
        self.model: LoadedModel | None = model
        self.spec = target.spec
        self.files = target.files
        self.leases = 0
        self.since = now
        self.asked_at = -math.inf  # when the last lease was granted
        self.clients: set[str] = set()  # some of those who had a lease
        self.idle_since = now  # means something at zero leases
        self.drain_until: float | None = None  # then its running sequences are ended
        self.successor: SwapRequest | None = None  # for whom it goes; None: it was unloaded
        self.closed = False

    def serves(self, spec: ModelSpec, device: str | None) -> bool:
        """True for the model that was asked for, of the same files; None stands for any device."""
        if self.model is None or not spec.is_same_model(self.spec):
            return False
        return device is None or device in (self.spec.device, self.model.device)

    @property
    def load_s(self) -> float:
        """The cost of having it again."""
        return self.model.load_s if self.model else 0.0

    def grant(self, now: float, let_go: Callable[[Residency], None], client: str = "") -> Lease:
        """One more lease on the model; ``let_go`` is called when it is released."""
        assert self.model is not None
        if len(self.clients) < MOST_CLIENTS:
            self.clients.add(client)
        self.leases += 1
        self.asked_at = now
        return Lease(self.model, lambda: let_go(self))

    def held_enough(self, min_s: float) -> float:
        """From when on a switch may interrupt it: a load must be worth its time."""
        return self.since + max(min(5 * self.load_s, 30.0), min_s)

    def stayed(self, min_s: float) -> float:
        """From when on a switch that is paid for may interrupt it: loading takes a tenth then."""
        return min(self.since + max(10 * self.load_s, STAY_S), self.held_enough(min_s))

    def idle_enough(self, min_s: float) -> float:
        """From when on it may go though it is in demand, at zero leases.

        Whoever asks again at once should find it; to wait longer than a load takes would cost
        more than it can save.
        """
        return min(self.since + min_s, self.idle_since + min(self.load_s, QUIET_S))

    def may_go(self, now: float) -> bool:
        """True where it may be evicted, once it drains."""
        return self.leases == 0 or (self.drain_until is not None and now >= self.drain_until)

    def close(self, error: ApiError | None) -> None:
        """End its engine, and running sequences with ``error``. Without the condition, once."""
        model, self.model = self.model, None
        try:
            if model is not None:
                model.engine.close(error)
        except Exception:
            log.exception("Closing the engine of %s failed", self.spec.name)
        self.closed = True

    @property
    def is_outdated(self) -> bool:
        """True where it should be loaded anew when nobody holds it."""
        return self.model is not None and self.model.is_outdated()

    @property
    def bytes(self) -> int:
        """The bytes that its eviction gives back: weights, adapters and KV cache."""
        model = self.model
        if model is None:
            return 0
        stats = model.engine.stats()
        return model.bytes + stats.kv_bytes + sum(each.bytes for each in stats.adapters)


class Waiter:
    """One caller in the queue for a model."""

    def __init__(
        self, target: SwapRequest, since: float, wants_lease: bool, client: str = ""
    ) -> None:
        self.target = target
        self.client = client  # who pays for the load
        self.since = since
        self.wants_lease = wants_lease  # False: it wants the model resident, no more
        self.lease: Lease | None = None
        self.error: ApiError | None = None
        self.answered = threading.Event()

    def refuse(self, error: ApiError) -> None:
        """Answer with an error."""
        self.error = error
        self.answered.set()


class SwapRequest:
    """A model that somebody waits for: its queue and what is known of it so far."""

    def __init__(
        self, spec: ModelSpec, device: str | None = None, files: ModelFiles | None = None
    ) -> None:
        self.spec = spec
        self.device = device  # as asked for; None: any will do
        self.files = files  # None until prepared
        self.waiters: list[Waiter] = []  # first come, first served
        self.is_preparing = False
        self.is_checked = False  # whether the memory was, with ``checked_beside`` resident
        self.checked_beside: Residency | None = None
        self.fits_beside = False
        self.replaced: Residency | None = None  # what was evicted for it
        self.is_charged = False  # those who wait for it keep others waiting
        self.progress: tuple[float, str] = (0.0, "")
        self.made_at = time.time()
        self.is_loading = False
        self.is_cancelled = False  # while it is prepared: somebody wanted it, and does no more

    @property
    def key(self) -> tuple[str, Source, str | None]:
        """Callers with the same key share one load."""
        return self.spec.name, self.spec.source, self.device

    @property
    def stage(self) -> Stage:
        """The part of its way that it is on."""
        return "loading" if self.is_loading else "preparing" if self.is_preparing else "waiting"

    @property
    def head_since(self) -> float:
        """The time at which the caller who has waited longest came."""
        return self.waiters[0].since

    @property
    def clients(self) -> set[str]:
        """Those who wait for it."""
        return {waiter.client for waiter in self.waiters}

    def report(self, share: float, text: str) -> None:
        """Note how far the preparation is; called by the loader, from any thread.

        Raises ModelUnloaded, which ends a download, where nobody wants the model any more.
        """
        if self.is_cancelled:
            raise cancelled(self.spec.name)
        self.progress = (share, text)

    def begin_load(self) -> None:
        """Its files are read now."""
        self.is_loading = True
        self.report(0.0, "loading")


class RecentErrors:
    """Why models could not be loaded, and which of them not to try again yet."""

    LIMIT = 64  # ids of the Hub come from requests: their number must not grow without end
    RETRY_AFTER_S = 60

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        self._refused: dict[Hashable, tuple[float, ApiError]] = {}  # by key of a ModelSpec

    def note(self, name: str, error: ApiError) -> None:
        """Keep the message for the status."""
        self.messages.pop(name, None)
        self.messages[name] = error.message
        if len(self.messages) > self.LIMIT:
            del self.messages[next(iter(self.messages))]

    def refuse(self, spec: ModelSpec, error: ApiError, now: float) -> None:
        """Refuse leases of the model for a minute, so that a retry loop evicts nothing."""
        recent = {key: entry for key, entry in self._refused.items() if entry[0] > now}
        self._refused = {**recent, spec.key: (now + self.RETRY_AFTER_S, error)}

    def check(self, spec: ModelSpec, now: float) -> None:
        """Raise the error that keeps the model from being tried now."""
        until, error = self._refused.get(spec.key, (now, None))
        if error is not None and until > now:
            seconds = max(1, round(until - now))
            message = f"{error.message} (the next try is possible in {seconds} s)"
            raise renewed(error, message, retry_after=seconds)

    def forget(self, spec: ModelSpec) -> None:
        """It has loaded."""
        self.messages.pop(spec.name, None)
        self._refused.pop(spec.key, None)


def cancelled(name: str) -> ModelUnloaded:
    """The error for a load that was taken back."""
    return ModelUnloaded(f"The load of model '{name}' was cancelled", param="model")


def shutting_down() -> ServerShuttingDown:
    """The error for those who wait when the server ends."""
    return ServerShuttingDown("The server is shutting down", retry_after=5)


def renewed(
    error: ApiError, message: str | None = None, *, retry_after: int | None = None
) -> ApiError:
    """The same error for one more thread: a shared one would collect all their tracebacks.

    A traceback also keeps alive what its frames hold, such as half of a model's weights.
    """
    fresh = copy.copy(error).with_traceback(None)
    fresh.__cause__ = fresh.__context__ = None
    fresh.message = message or error.message
    fresh.args = (fresh.message,)
    fresh.retry_after = retry_after or error.retry_after
    return fresh


def load_error(error: Exception, name: str) -> ApiError:
    """The error that callers get for one while preparing or loading."""
    if isinstance(error, ApiError):
        return renewed(error)
    return ModelLoadFailed(f"Model '{name}' could not be loaded: {type(error).__name__}: {error}")
