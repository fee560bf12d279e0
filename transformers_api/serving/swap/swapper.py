"""One resident model: who gets it, when it goes, what comes next.

A request for a model takes a lease. When another model is wanted, the swapper prepares it while
the resident one goes on serving, decides when the switch is due, lets the leases run out, evicts
and loads. ``policy.py`` decides; here is the one condition that guards its decisions, the one
thread that carries them out, and the calls that wait. Whatever takes long (prepare, check, load,
close) is called outside the condition.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from transformers_api.errors import (
    ApiError,
    ModelNotLoaded,
    ModelUnloaded,
    Unavailable,
)
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel, Loader
from transformers_api.serving.swap.policy import Step, SwapPolicy, SwapRules
from transformers_api.serving.swap.residency import (
    Lease,
    ModelResolver,
    RecentErrors,
    Residency,
    SilentListener,
    SwapperListener,
    SwapperStatus,
    SwapRequest,
    Waiter,
    load_error,
    renewed,
    shutting_down,
)

log = logging.getLogger(__name__)


class Swapper:
    """Gives out leases on the one resident model, and switches models.

    Fair, with hysteresis: requests for the resident model are served at once until a switch is
    decided. A switch to the model whose first caller has waited longest is decided when the
    resident has no leases, or when that caller has waited ``swap_after_s`` and the resident was
    held for five times its load time (at most 30 s). A resident that others have asked for since
    that caller came, so that both are in demand, is held for ``min_resident_s`` before either
    counts, unless it is idle for as long as loading it took (at most 1 s). A caller whose client
    can pay for the load (``swap_time.py``) needs none of that patience, and comes before those who
    cannot. Then nobody gets the old model any more. Its leases have ``drain_s`` to end; after that
    its running sequences are ended.

    Safe from any thread.
    """

    def __init__(
        self,
        registry: ModelResolver,
        loader: Loader,
        rules: SwapRules,
        *,
        wait_s: float,
        auto_load: bool = True,
        listener: SwapperListener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._wait_s = wait_s
        self._auto_load = auto_load
        self._listener = listener or SilentListener()
        self._clock = clock
        self._condition = threading.Condition()
        self._policy = SwapPolicy(rules, self._release)
        self._errors = RecentErrors()
        self._refusal: ApiError | None = None
        self._closed = False
        threading.Thread(target=self._run, name="swapper", daemon=True).start()

    # What requests call.

    def lease(
        self,
        spec: ModelSpec,
        *,
        model_id: str | None = None,
        client: str = "",
        cancellation: Cancellation | None = None,
        timeout: float | None = None,
    ) -> Lease:
        """Wait until the model of ``spec`` is resident; keep it there until the lease is released.

        May download, drain, evict and load, which can take minutes. ``model_id``: the name or
        alias that was used, for messages. ``client`` pays for a switch. ``timeout`` in seconds;
        None: the swapper's ``wait_s``.

        Raises ModelNotLoaded before anything happens; ModelLoadFailed, InsufficientMemory or
        InsufficientStorage when it cannot be had; Unavailable on timeout, ClientGone on
        cancellation, ServerShuttingDown after ``close``.
        """
        if cancellation is not None and cancellation.is_cancelled:
            raise cancellation.error
        with self._condition:
            self._check_open()
            resident = self._policy.resident
            if resident is not None and resident.serves(spec, None):
                return resident.grant(self._clock(), self._release, client)
            self._check_may_load(spec, model_id or spec.name)
            waiter = self._enqueue(SwapRequest(spec), wants_lease=True, client=client)
        if cancellation is not None:
            cancellation.on_cancel(lambda: self._withdraw(waiter, cancellation.error))
        self._await(waiter, self._wait_s if timeout is None else timeout)
        assert waiter.lease is not None
        if cancellation is not None and cancellation.is_cancelled:  # both at the same moment
            waiter.lease.release()
            raise cancellation.error
        return waiter.lease

    def load(
        self,
        model_id: str,
        *,
        device: str | None = None,
        client: str = "",
        wait: bool = True,
        timeout: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """Make ``model_id`` resident; whether it was not so already.

        Takes its turn like any request, but is not refused by ``auto_load`` or a recent failure.
        ``device`` overrides the registry's; resident on another device is another model. With
        ``wait`` False, and after ``cancellation``, it goes on in the background. ``timeout`` in
        seconds, None: no limit. Raises what ``lease`` raises.
        """
        spec = self._registry.resolve(model_id)
        with self._condition:
            self._check_open()
            resident = self._policy.resident
            if resident is not None and resident.serves(spec, device):
                return False
            if device is not None:
                spec = replace(spec, device=device)
            target = SwapRequest(spec, device)
            waiter = self._enqueue(target, wants_lease=False, client=client)
        if wait and cancellation is not None:
            cancellation.on_cancel(lambda: self._leave(waiter, cancellation.error))
        if wait:
            self._await(waiter, timeout)
        return True

    def evict(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        wait: bool = True,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """Unload ``model_id``, or whatever is resident; False when it is not resident.

        Requests to load it that have not led to anything yet are taken back.

        Waits for its leases as a switch does; ``force`` ends its running sequences at once with
        ModelUnloaded. Goes on in the background with ``wait`` False, and after ``cancellation``.
        Raises ModelNotFound.
        """
        name = None if model_id is None else self._registry.resolve(model_id).name
        with self._condition:
            policy = self._policy
            if policy.fallback is not None and name in (None, policy.fallback.spec.name):
                policy.fallback = None
            residency = next(policy.in_memory(name), None)
            if residency is None:
                self._condition.notify_all()
                return name is not None and policy.cancel_loads(name)
            residency.successor = None  # nothing brings it back
            if residency is policy.resident:
                policy.retire(residency, self._clock())
            if force:
                residency.drain_until = self._clock()
            self._condition.notify_all()
            cancellation = cancellation or Cancellation()
            cancellation.on_cancel(self.wake)
            while wait and not residency.closed:
                cancellation.check()
                self._condition.wait()
        return True

    def status(self) -> SwapperStatus:
        """The resident model, the next one, the queues. Advisory: never branch a mutation on it."""
        with self._condition:
            return self._policy.status(dict(self._errors.messages))

    def resident(self) -> LoadedModel | None:
        """The model in memory without a lease, to look at what it is. Loads nothing."""
        with self._condition:
            residency = self._policy.resident
            return None if residency is None else residency.model

    def refuse(self, error: ApiError | None = None) -> None:
        """From now on raise ``error`` for new leases and loads; those who hold or wait go on."""
        with self._condition:
            self._refusal = error or shutting_down()

    def close(self, error: ApiError | None = None) -> None:
        """End it all: waiters raise ``error``, running sequences end with it. Idempotent.

        Does not wait for a load in progress; what that loads is closed at once.
        """
        error = error or shutting_down()
        with self._condition:
            self._refusal, self._closed = error, True
            in_memory = self._policy.end(error)
        for residency in in_memory:
            residency.close(renewed(error))
        self.wake()

    # What they share.

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise renewed(self._refusal)

    def _check_may_load(self, spec: ModelSpec, model_id: str) -> None:
        self._errors.check(spec, self._clock())
        if not self._auto_load and not self._policy.is_loading_on_request(spec.name):
            raise ModelNotLoaded(model_id)

    def _enqueue(self, target: SwapRequest, *, wants_lease: bool, client: str) -> Waiter:
        """Join the queue for the model; the first caller starts its preparation."""
        if target.key not in self._policy.targets:
            target.is_preparing = True
            name = f"prepare {target.spec.name}"
            threading.Thread(target=self._prepare, args=(target,), name=name, daemon=True).start()
        waiter = self._policy.join(target, self._clock(), wants_lease, client)
        self._condition.notify_all()
        return waiter

    def _await(self, waiter: Waiter, timeout: float | None) -> None:
        if not waiter.answered.wait(timeout):
            name = waiter.target.spec.name
            message = f"Model '{name}' did not become available within {timeout:g} s"
            self._withdraw(waiter, Unavailable(message, param="model", retry_after=30))
        if waiter.error is not None:
            raise waiter.error

    def _withdraw(self, waiter: Waiter, error: ApiError) -> None:
        with self._condition:
            self._policy.withdraw(waiter, error)
            self._condition.notify_all()

    def _leave(self, waiter: Waiter, error: ApiError) -> None:
        """Wait no more; what was asked for goes on."""
        with self._condition:
            if not waiter.answered.is_set():
                self._policy.join(waiter.target, self._clock(), False, waiter.client)
        self._withdraw(waiter, error)

    def wake(self) -> None:
        """Something has changed that no call announced: look again at what is due."""
        with self._condition:
            self._condition.notify_all()

    def _release(self, residency: Residency) -> None:
        with self._condition:
            residency.leases -= 1
            if residency.leases == 0:
                residency.idle_since = self._clock()
                self._condition.notify_all()

    # The thread that carries the decisions out.

    def _run(self) -> None:
        while (step := self._next_step()) is not None:
            try:
                self._take(step)
            except Exception:  # a defect here must not end all switching for good
                log.exception("The swapper's step %s failed", step[0])

    def _next_step(self) -> Step | None:
        with self._condition:
            while not self._closed:
                step = self._policy.next(self._clock())
                if step is not None:
                    return step
                now = self._clock()
                left_s = self._policy.deadline(now) - now
                self._condition.wait(None if left_s == math.inf else max(0.0, left_s))
        return None

    def _take(self, step: Step) -> None:
        match step:
            case ("check", target):
                self._check(target)
            case ("load", target):
                self._load(target)
            case ("evict", residency):
                self._evict(residency)
            case _:
                assert_never(step)

    def _prepare(self, target: SwapRequest) -> None:
        """Runs in a thread of its own: a download must not delay other models."""
        try:
            files = self._loader.prepare(target.spec, target.report)
        except Exception as error:
            if not target.is_cancelled:
                self._fail(target, error)
            return
        with self._condition:
            target.is_preparing, target.files = False, files
            self._policy.drop_if_unwanted(target)
            self._condition.notify_all()

    def _check(self, target: SwapRequest) -> None:
        with self._condition:
            resident = self._policy.resident
            in_memory = list(self._policy.in_memory())
        assert target.files is not None
        try:
            freed = sum(residency.bytes for residency in in_memory)
            fits_beside = self._loader.check_memory(target.spec, target.files, freed)
        except Exception as error:
            self._fail(target, error)
            return
        with self._condition:
            target.is_checked, target.checked_beside = True, resident
            target.fits_beside = fits_beside

    def _evict(self, residency: Residency) -> None:
        error = None
        if residency.leases:
            log.warning("Ending %d requests of %s", residency.leases, residency.spec.name)
            successor = residency.successor
            reason = f" to load '{successor.spec.name}'" if successor else ""
            error = ModelUnloaded(f"Model '{residency.spec.name}' was unloaded{reason}")
        residency.close(error)
        log.info("Evicted %s", residency.spec.name)
        with self._condition:
            self._policy.gone(residency)
            self._tell(self._listener.on_evict, residency.spec.name)
            self._condition.notify_all()

    def _load(self, target: SwapRequest) -> None:
        if self._policy.resident is not None:  # beside it; it may have grown since the first check
            self._check(target)
            if target is not self._policy.decided or not target.fits_beside:
                return
        assert target.files is not None
        log.info("Loading %s", target.spec.name)
        target.begin_load()
        try:
            model = self._loader.load(target.spec, target.files, target.report)
        except Exception as error:
            self._fail(target, error, loading=True)
            gc.collect()  # the frames of the error held what was loaded so far
            return
        log.info("Loaded %s in %.1f s", target.spec.name, model.load_s)
        residency = Residency(model, target, self._clock())
        with self._condition:
            if not self._closed:
                self._policy.publish(residency, target)
                self._errors.forget(target.spec)
            self._tell(self._listener.on_load, target.spec.name, model.load_s)
        if self._closed:
            residency.close(shutting_down())

    def _fail(self, target: SwapRequest, error: Exception, loading: bool = False) -> None:
        name = target.spec.name
        if not isinstance(error, ApiError):
            log.error("Model %s could not be loaded", name, exc_info=error)
        failure = load_error(error, name)
        log.warning("Model %s failed: %s", name, failure.message)
        with self._condition:
            if loading and target is not self._policy.fallback:
                failure.retry_after = RecentErrors.RETRY_AFTER_S
                self._errors.refuse(target.spec, failure, self._clock())
            self._errors.note(name, failure)
            self._policy.failed(target, failure)
            self._tell(self._listener.on_load_failed, name, failure)
            self._condition.notify_all()

    def _tell(self, event: Callable[..., None], *facts: object) -> None:
        """With the condition held: who sees the outcome finds it counted, and the reverse."""
        try:
            event(*facts)
        except Exception:
            log.exception("A listener of the swapper failed")
