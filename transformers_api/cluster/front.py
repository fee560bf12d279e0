"""The engine of a front: models in replicas. torch is never imported here.

A lease is no promise of a replica: the model's facts are had once, from a replica that has it in
memory then, and each request is a lease of its own where it arrives.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

from transformers_api import logs
from transformers_api.cluster.messages import (
    Caller,
    ModelFacts,
    ReplicaStatus,
    TextFacts,
)
from transformers_api.cluster.remote_model import remote_base, remote_model
from transformers_api.cluster.transport import RayTransport, Transport, ask
from transformers_api.config.environment import set_for_transformers
from transformers_api.engine.base import EngineStats
from transformers_api.errors import ApiError, ServerShuttingDown
from transformers_api.inspection.questions import Gradients, Inspected, Question
from transformers_api.local_engine import EngineSide, Parts
from transformers_api.server.readiness import LAST_WORDS_S
from transformers_api.serving.embeddings import EmbeddingModels
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.inspect.suggested_layer import suggested_layer
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.residency import Lease, SwapperStatus, renewed, shutting_down
from transformers_api.serving.text.model_text import ModelText, TokenizerOnly

T = TypeVar("T")
log = logging.getLogger(__name__)
MOST_MODELS = 64  # whose facts are kept; tokenizers are large
POLL_S = 1.0  # between two looks at the replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus(SwapperStatus):
    """The snapshot of all replicas together."""

    replicas: Sequence[ReplicaStatus] = ()

    def holds(self, name: str) -> bool:
        """True where the model is in the memory of a replica."""
        return any(each.swapper.holds(name) for each in self.replicas)


class ClusterModels:
    """Meets ModelPool, for the models of all replicas, or (``encoder``) those beside them."""

    def __init__(
        self,
        transport: Transport,
        registry: ModelRegistry,
        *,
        wait_s: float,
        encoder: bool = False,
    ) -> None:
        self._transport = transport
        self._registry = registry
        self._wait_s = wait_s
        self._encoder = encoder
        self._lock = threading.Lock()
        self._facts: OrderedDict[str, tuple[ModelFacts, LoadedModel]] = OrderedDict()
        self._leases: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._refusal: ApiError | None = None
        self.replicas: Sequence[ReplicaStatus] = ()

    def lease(
        self,
        spec: ModelSpec,
        *,
        model_id: str | None = None,
        client: str = "",
        cancellation: Cancellation | None = None,
        timeout: float | None = None,
    ) -> Lease:
        """See Swapper."""
        self._check_open()
        cancellation = cancellation or Cancellation()
        cancellation.check()
        caller = Caller(spec=spec, client=client, encoder=self._encoder)
        facts, base = self._known_facts(spec) or self._fetched(caller, cancellation)
        model = remote_model(
            self._transport, base, caller, facts, cancellation, partial(self.forget, spec)
        )
        with self._lock:
            self._leases[spec.name] += 1
        return Lease(model, partial(self._release, spec.name))

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
        """See Swapper."""
        self._check_open()
        spec = self._registry.resolve(model_id)
        work = partial(self._load, spec, device, client, cancellation or Cancellation())
        if wait:
            return work()
        threading.Thread(target=work, name=f"load {spec.name}", daemon=True).start()
        return True

    def evict(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        wait: bool = True,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """See Swapper; out of the memory of all replicas."""
        name = None if model_id is None else self._registry.resolve(model_id).name
        future = self._transport.start(self._transport.broadcast("evict", name, self._encoder))
        with self._lock:
            self._facts.pop(name or "", None)
        return any(answer is True for answer in future.result())

    def status(self) -> SwapperStatus:
        """See Swapper."""
        replicas = self.replicas
        with self._lock:
            waiting = Counter({name: count for name, count in self._waiting.items() if count})
            leases = sum(self._leases.values())
        return _together(replicas, waiting, leases)

    def resident(self) -> LoadedModel | None:
        """None: of several replicas none is the one."""
        return None

    def refuse(self, error: ApiError | None = None) -> None:
        """See Swapper."""
        self._refusal = error or shutting_down()

    def close(self, error: ApiError | None = None) -> None:
        """See Swapper. Replicas go on, for other fronts."""
        self.refuse(error)

    def wake(self) -> None:
        """See Swapper: nobody waits here for what is not announced."""

    def text(self, spec: ModelSpec) -> ModelText:
        """See ``serving.swap.Loader``."""
        if (entry := self._known_facts(spec)) is not None:
            return entry[1]
        caller = Caller(spec=spec, request_id=logs.request_id.get())
        facts: TextFacts = ask(self._transport, Cancellation(), "text", spec.resident.name, caller)
        return TokenizerOnly(
            spec=spec,
            tokenizer=facts.tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
        )

    def forget(self, spec: ModelSpec) -> None:
        """Ask for the facts anew, before the next request."""
        with self._lock:
            self._facts.pop(spec.name, None)

    def _known_facts(self, spec: ModelSpec) -> tuple[ModelFacts, LoadedModel] | None:
        with self._lock:
            entry = self._facts.get(spec.name)
            if entry is None or entry[1].spec != spec:
                return None
            self._facts.move_to_end(spec.name)
            return entry

    def _fetched(
        self, caller: Caller, cancellation: Cancellation
    ) -> tuple[ModelFacts, LoadedModel]:
        """The facts, from a replica that has loaded the model for it."""
        spec = caller.spec
        caller = replace(caller, request_id=logs.request_id.get())
        with self._lock:
            self._waiting[spec.name] += 1
        try:
            facts: ModelFacts = ask(
                self._transport, cancellation, "describe", self._place(spec), caller
            )
        finally:
            with self._lock:
                self._waiting[spec.name] -= 1
        entry = facts, remote_base(self._transport, spec, facts)
        with self._lock:
            self._facts[spec.name] = entry
            if len(self._facts) > MOST_MODELS:
                self._facts.popitem(last=False)
        return entry

    def _load(
        self, spec: ModelSpec, device: str | None, client: str, cancellation: Cancellation
    ) -> bool:
        caller = Caller(spec=spec, client=client, request_id=logs.request_id.get())
        loaded = ask(self._transport, cancellation, "load", self._place(spec), caller, device)
        return bool(loaded)

    def _place(self, spec: ModelSpec) -> str:
        """The id that requests for the model are routed by; encoders are on any replica."""
        return "" if self._encoder else spec.resident.name

    def _release(self, name: str) -> None:
        with self._lock:
            self._leases[name] -= 1

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise renewed(self._refusal)


class ClusterInspections(Inspections):
    """Inspections that wait and run in replicas."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(0, 0.0)
        self._transport = transport
        self._answers: dict[tuple[str, str], Any] = {}

    def ask(self, model: LoadedModel, question: Question[T], cancellation: Cancellation) -> T:
        """See Inspections."""
        caller = Caller(spec=model.spec, request_id=logs.request_id.get())
        name = model.spec.resident.name
        answer = ask(self._transport, cancellation, "ask", name, caller, question)
        return cast(T, answer)

    def has_gradients(
        self, model: LoadedModel, inspector: Inspected, cancellation: Cancellation
    ) -> bool:
        """See Inspections."""
        return bool(
            self._once(model, "gradients", lambda: self.ask(model, Gradients(), cancellation))
        )

    def suggested_layer(
        self, model: LoadedModel, inspector: Inspected, cancellation: Cancellation
    ) -> int | None:
        """See Inspections."""

        def find() -> int | None:
            return suggested_layer(
                model, inspector, lambda question: self.ask(model, question, cancellation)
            )

        return cast("int | None", self._once(model, "layer", find))

    def _once(self, model: LoadedModel, name: str, find: Callable[[], Any]) -> Any:
        key = model.fingerprint, name
        if key not in self._answers:
            self._answers[key] = find()
        return self._answers[key]


class Watch:
    """Looks at the replicas again and again, and knows whether requests may be sent."""

    def __init__(self, transport: Transport, models: ClusterModels, preloaded: str | None) -> None:
        self._transport = transport
        self._models = models
        self._preloaded = preloaded
        self._leaving: str | None = None
        self._trouble = ""

    def begin(self) -> None:
        """Begin, once the cluster is there."""
        threading.Thread(target=self._run, name="cluster-watch", daemon=True).start()

    def ready(self) -> tuple[bool, str]:
        """(may requests be sent, why not)."""
        reason = self._leaving or self._transport.fault()
        if reason is None and not self._models.replicas:
            reason = "No replica is there"
        if reason is None and self._preloaded is not None:
            reason = f"Loading {self._preloaded}"
        return reason is None, reason or "ready"

    def leave(self, reason: str) -> None:
        """Send no more requests here."""
        self._leaving = reason

    def _run(self) -> None:
        if self._preloaded is not None:
            threading.Thread(target=self._preload, name="cluster-preload", daemon=True).start()
        while True:
            began = time.monotonic()
            try:
                answers = self._transport.start(self._transport.broadcast("status")).result()
                self._models.replicas = sorted(answers, key=lambda each: str(each.replica))
            except Exception as error:
                self._note(f"The replicas cannot be looked at: {error}")
                self._models.replicas = ()
            time.sleep(max(POLL_S - (time.monotonic() - began), 0.1))

    def _note(self, trouble: str) -> None:
        """Log it once, not every second."""
        if trouble != self._trouble:
            log.warning("%s", trouble)
        self._trouble = trouble

    def _preload(self) -> None:
        while self._preloaded is not None:
            try:
                self._models.load(self._preloaded)
                self._preloaded = None
            except ApiError as error:
                self._note(f"{self._preloaded} cannot be loaded: {error.message}")
                time.sleep(POLL_S)


def cluster_engine(parts: Parts, transport: Transport | None = None) -> EngineSide:
    """The engine of a front. ``transport`` stands in for Ray's."""
    without_torch()
    settings = parts.settings
    ray = None
    if transport is None:
        transport = ray = RayTransport(settings, lambda: watch.begin())
    models = ClusterModels(transport, parts.registry, wait_s=settings.model_wait_s)
    watch = Watch(transport, models, parts.preloaded)
    embeddings = None
    if settings.enable_embeddings_backend:
        encoders = ClusterModels(
            transport, parts.registry, wait_s=settings.model_wait_s, encoder=True
        )
        embeddings = EmbeddingModels(parts.registry, models, encoders, max(settings.max_queue, 1))

    def drain(grace_s: float) -> None:
        error = ServerShuttingDown("The server is shutting down", retry_after=5)
        watch.leave(error.message)
        models.refuse(error)
        parts.admission.end_after(grace_s - LAST_WORDS_S, error)

    return EngineSide(
        models=models,
        embeddings=embeddings,
        inspections=ClusterInspections(transport),
        text_of=models.text,
        devices=lambda: ("cpu", "cuda") if settings.cluster_replica_gpus else ("cpu",),
        ready=watch.ready,
        fault=lambda: None,
        drain=drain,
        begin=watch.begin if ray is None else ray.connect,
    )


def without_torch() -> None:
    """Let nobody import torch in this process: it would take seconds and half a gigabyte."""
    if "torch" not in sys.modules:
        set_for_transformers()
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say so


def _together(
    replicas: Sequence[ReplicaStatus], waiting: Counter[str], leases: int
) -> ClusterStatus:
    """The replicas as if they were one server: the first that has a model speaks for all."""
    holders = [each for each in replicas if each.swapper.model is not None]
    first = next(iter(holders or replicas), None)
    own = SwapperStatus(state="empty") if first is None else first.swapper
    for each in replicas:
        waiting.update(each.swapper.waiting)
    stats = [each.swapper.engine for each in replicas]
    values = {name: getattr(own, name) for name in SwapperStatus.__dataclass_fields__}
    values |= {
        "since": time.monotonic() - (first.age_s if first else 0.0),
        "engine": replace(
            own.engine,
            running=sum(each.running for each in stats),
            waiting=sum(each.waiting for each in stats),
            prompt_tokens=sum(each.prompt_tokens for each in stats),
            generated_tokens=sum(each.generated_tokens for each in stats),
        )
        if stats
        else EngineStats(),
        "leases": leases,
        "waiting": dict(waiting),
        "last_errors": {
            name: text for each in replicas for name, text in each.swapper.last_errors.items()
        },
        "replicas": tuple(replicas),
    }
    return ClusterStatus(**values)
