"""Adapters over one resident model: a lease on an adapter is one on its base, and the adapter.

A switch is one between bases: to an adapter whose base is resident nothing is loaded but the
adapter's own numbers. What the adapter's files say is checked before its base is asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.errors import (
    ApiError,
    InsufficientMemory,
    InsufficientStorage,
    ModelLoadFailed,
    Unavailable,
)
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel, Loader, PreparedAdapter
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.residency import (
    Lease,
    ModelResolver,
    SwapperStatus,
    load_error,
    renewed,
)
from transformers_api.serving.swap.swapper import Swapper

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseResolver:
    """Meets ModelResolver: the model that is in memory for an id."""

    registry: ModelResolver

    def resolve(self, model_id: str) -> ModelSpec:
        """Raises ModelNotFound."""
        return self.registry.resolve(model_id).resident


class AdapterSwapper(Swapper):
    """A Swapper whose leases may be on a model with an adapter. Safe from any thread."""

    def __init__(
        self, registry: ModelResolver, loader: Loader, rules: SwapRules, **options: Any
    ) -> None:
        super().__init__(BaseResolver(registry), loader, rules, **options)
        self._entries = registry
        self._preparations = Preparations(loader)
        self._waiting = Counter[str]()  # callers that wait for an adapter, not for its base

    def lease(
        self,
        spec: ModelSpec,
        *,
        model_id: str | None = None,
        client: str = "",
        cancellation: Cancellation | None = None,
        timeout: float | None = None,
    ) -> Lease:
        """See Swapper. The adapter stays in memory until the lease is released, too."""
        if spec.base is None:
            return super().lease(
                spec, model_id=model_id, client=client, cancellation=cancellation, timeout=timeout
            )
        until = time.monotonic() + (self._wait_s if timeout is None else timeout)
        source = self._prepared(spec, until, cancellation, is_answer=True)
        base = super().lease(
            spec.base,
            model_id=model_id,
            client=client,
            cancellation=cancellation,
            timeout=max(until - time.monotonic(), 0.0),
        )
        try:
            model = self._adapted(base.model, spec, source, until, cancellation)
        except BaseException:
            base.release()
            raise

        close = model.engine.close

        def let_go() -> None:
            close()
            base.release()

        return Lease(model, let_go)

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
        """See Swapper. Of an adapter its base, and then the adapter."""
        spec = self._entries.resolve(model_id)
        options: dict[str, Any] = {"device": device, "client": client, "timeout": timeout}
        if spec.base is None:
            return super().load(model_id, wait=wait, cancellation=cancellation, **options)
        if wait:
            return self._load_both(spec, cancellation, options)
        if self.status().holds(spec.name):
            return False
        name = f"load {spec.name}"
        self._count(spec, 1)
        threading.Thread(
            target=self._load_unheard, args=(spec, options), name=name, daemon=True
        ).start()
        return True

    def _load_both(
        self, spec: ModelSpec, cancellation: Cancellation | None, options: dict[str, Any]
    ) -> bool:
        assert spec.base is not None
        timeout = options["timeout"]
        until = time.monotonic() + (self._wait_s if timeout is None else timeout)
        source = self._prepared(spec, until, cancellation)
        has_loaded = super().load(spec.name, cancellation=cancellation, **options)
        has_loaded = has_loaded or not self.status().holds(spec.name)
        with super().lease(spec.base, client=options["client"], cancellation=cancellation) as base:
            self._adapted(base.model, spec, source, until, cancellation).engine.close()
        return has_loaded

    def _load_unheard(self, spec: ModelSpec, options: dict[str, Any]) -> None:
        try:
            self._load_both(spec, None, options)
        except ApiError as error:
            log.warning("Model %s could not be loaded: %s", spec.name, error.message)
            with self._condition:
                if spec.name not in self._errors.messages:  # its base's fault
                    self._errors.note(spec.name, error)
                    self._tell(self._listener.on_load_failed, spec.name, error)
        finally:
            self._count(spec, -1)

    def evict(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        wait: bool = True,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """See Swapper. An adapter goes alone, and only while nobody uses it."""
        spec = None if model_id is None else self._entries.resolve(model_id)
        if spec is None or spec.base is None:
            return super().evict(model_id, force=force, wait=wait, cancellation=cancellation)
        model = self.resident()
        is_base = model is not None and spec.base.is_same_model(model.spec)
        return is_base and model is not None and model.engine.evict_adapter(spec.name)

    def status(self) -> SwapperStatus:
        """See Swapper. Those who wait for an adapter alone are counted by its name."""
        status = super().status()
        with self._condition:
            return replace(status, waiting={**status.waiting, **self._waiting})

    @contextmanager
    def _wait_for(self, spec: ModelSpec) -> Iterator[None]:
        """Count a caller that waits for an adapter, and note why one cannot be had."""
        self._count(spec, 1)
        try:
            yield
        except (ModelLoadFailed, InsufficientMemory, InsufficientStorage) as error:
            with self._condition:
                self._errors.note(spec.name, error)
                self._tell(self._listener.on_load_failed, spec.name, error)
            raise
        finally:
            self._count(spec, -1)

    def _count(self, spec: ModelSpec, callers: int) -> None:
        with self._condition:
            self._waiting[spec.name] += callers
            self._waiting = +self._waiting  # without those that nobody waits for

    def _adapted(
        self,
        base: LoadedModel,
        spec: ModelSpec,
        source: AdapterSource,
        until: float,
        cancellation: Cancellation | None,
    ) -> LoadedModel:
        def is_cancelled() -> bool:
            return cancellation is not None and cancellation.is_cancelled

        timeout = max(until - time.monotonic(), 0.0)
        try:
            with self._wait_for(spec):
                model = self._loader.adapt(
                    base, spec, source, timeout=timeout, is_cancelled=is_cancelled
                )
        except ModelLoadFailed as error:  # so that a retry loop switches nothing
            with self._condition:
                self._errors.refuse(spec, load_error(error, spec.name), self._clock())
            raise
        with self._condition:
            self._errors.forget(spec)
        return model

    def _prepared(
        self,
        spec: ModelSpec,
        until: float,
        cancellation: Cancellation | None,
        *,
        is_answer: bool = False,
    ) -> AdapterSource:
        """The adapter, checked; where its base has to come first, whether there is memory for both.

        ``is_answer``: an answer is wanted, not the model itself, for which more is tried.
        """
        assert spec.base is not None
        with self._condition:
            self._check_open()
            resident = self._policy.resident
            is_here = resident is not None and resident.serves(spec.base, None)
            if is_answer:
                self._errors.check(spec, self._clock())
            if is_answer and not is_here:
                self._check_may_load(spec.base, spec.name)
            if not is_here:
                freed = sum(residency.bytes for residency in self._policy.in_memory())
        with self._wait_for(spec):
            source, files = self._preparations.prepared(spec, until, cancellation)
            if not is_here:
                self._loader.check_memory(spec.base, files, freed - source.bytes)
        return source


@dataclass
class _Preparation:
    """An adapter whose files are made complete."""

    result: PreparedAdapter | None = None
    error: ApiError | None = None


class Preparations:
    """Preparations of adapters, each once for all who wait, on a thread of its own."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._condition = threading.Condition()
        self._running: dict[str, _Preparation] = {}

    def prepared(
        self, spec: ModelSpec, until: float, cancellation: Cancellation | None
    ) -> PreparedAdapter:
        """See Loader.prepare_adapter. Raises Unavailable after ``until``, by time.monotonic()."""
        if (ready := self._loader.find_adapter(spec)) is not None:
            return ready
        if cancellation is not None:
            cancellation.on_cancel(self._wake)
        with self._condition:
            running = self._running.get(spec.name)
            if running is None:
                running = self._running[spec.name] = _Preparation()
                name = f"prepare {spec.name}"
                threading.Thread(
                    target=self._run, args=(spec, running), name=name, daemon=True
                ).start()
            while running.result is None and running.error is None:
                if cancellation is not None:
                    cancellation.check()
                left_s = until - time.monotonic()
                if left_s <= 0:
                    message = f"Model '{spec.name}' did not become available in time"
                    raise Unavailable(message, param="model", retry_after=30)
                self._condition.wait(left_s)
        if running.error is not None:
            raise renewed(running.error)
        assert running.result is not None
        return running.result

    def _run(self, spec: ModelSpec, running: _Preparation) -> None:
        result, failure = None, None
        try:
            result = self._loader.prepare_adapter(spec, lambda _share, _text: None)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.error("Adapter %s could not be prepared", spec.name, exc_info=error)
            failure = load_error(error, spec.name)
        with self._condition:
            running.result, running.error = result, failure
            del self._running[spec.name]
            self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()
