"""The engine of a front: models in replicas. torch is never imported here."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from transformers_api import logs
from transformers_api.cluster import ray_runtime
from transformers_api.cluster.messages import Caller, place_of
from transformers_api.cluster.metrics_page import merged
from transformers_api.cluster.models import ClusterModels
from transformers_api.cluster.transport import RayTransport, Transport, ask
from transformers_api.config.environment import set_for_transformers
from transformers_api.errors import ApiError, ServerShuttingDown
from transformers_api.inspection.editable import Editable
from transformers_api.inspection.logit_share import LogitPartsQuestion
from transformers_api.inspection.questions import Gradients, Inspected, Places, Question
from transformers_api.local_engine import EngineSide, Parts
from transformers_api.server.readiness import LAST_WORDS_S
from transformers_api.serving.embeddings import EmbeddingModels
from transformers_api.serving.inspect.calibration import Calibration
from transformers_api.serving.inspect.queue import OWN, Inspections, parts_of_beginning
from transformers_api.serving.inspect.stream_norms import stream_norms
from transformers_api.serving.inspect.suggested_layer import suggested_layer
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.replica_status import ReplicaStatus

T = TypeVar("T")
log = logging.getLogger(__name__)
SILENT = "It does not answer"
POLL_S = 1.0  # between two looks at the replicas


class ClusterInspections(Inspections):
    """Inspections that wait and run in replicas."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(0, 0.0)
        self._transport = transport
        self._answers: dict[tuple[str, str], Any] = {}

    def ask(self, model: LoadedModel, question: Question[T], cancellation: Cancellation) -> T:
        """See Inspections."""
        caller = Caller(spec=model.spec, request_id=logs.request_id.get())
        place = place_of(model.spec)
        answer = ask(self._transport, cancellation, "ask", place, caller, question)
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

    def editable(
        self, model: LoadedModel, inspector: Inspected, cancellation: Cancellation
    ) -> Editable:
        """See Inspections."""
        places = self._once(model, "places", lambda: self.ask(model, Places(), cancellation))
        return cast(Editable, places)

    def stream_norms(
        self,
        model: LoadedModel,
        inspector: Inspected,
        cancellation: Cancellation,
        calibration: Calibration = OWN,
    ) -> tuple[float, ...]:
        """See Inspections."""

        def find() -> tuple[float, ...]:
            return stream_norms(
                model,
                inspector,
                calibration,
                lambda question: self.ask(model, question, cancellation),
            )

        if not calibration.is_own:
            return find()
        return cast("tuple[float, ...]", self._once(model, "norms", find))

    def check_parts(
        self,
        model: LoadedModel,
        inspector: Inspected,
        question: LogitPartsQuestion,
        ids: Sequence[int],
        cancellation: Cancellation,
    ) -> None:
        """See Inspections."""
        own = parts_of_beginning(question, ids)
        self._once(model, f"parts by {question.by}", lambda: self.ask(model, own, cancellation))

    def _once(self, model: LoadedModel, name: str, find: Callable[[], Any]) -> Any:
        key = model.fingerprint, name
        if key not in self._answers:
            self._answers[key] = find()
        return self._answers[key]


class Watch:
    """Looks at the replicas again and again, and knows whether requests may be sent.

    ``admission`` has as many places as the replicas together, at most ``most``.
    """

    def __init__(
        self,
        transport: Transport,
        models: ClusterModels,
        encoders: ClusterModels,
        preloaded: str | None,
        admission: Admission,
        most: int,
    ) -> None:
        self._transport = transport
        self._admission, self._most = admission, most
        self._models, self._encoders = models, encoders
        self._preloaded = preloaded
        self._leaving: str | None = None
        self._trouble = ""
        self._silent: list[str] = []

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

    def look(self) -> None:
        """Look once, from one thread at a time."""
        try:
            replicas = with_silent(self._models.replicas, self._statuses())
            self._models.replicas = self._encoders.replicas = replicas
            self._note_replicas(replicas)
        except Exception as error:
            self._note(f"The replicas cannot be looked at: {error}")
            self._models.replicas = ()

    def _statuses(self) -> Sequence[ReplicaStatus | None]:
        """None of each that is not in time, which may be all; who is gone for good is told else."""
        try:
            work = self._transport.broadcast("status")
            answers: list[ReplicaStatus | None] = self._transport.start(work).result()
        except TimeoutError:
            answers = [None] * len(self._models.replicas)
        return answers

    def _run(self) -> None:
        preload = threading.Thread(target=self._preload, name="cluster-preload", daemon=True)
        while True:
            began = time.monotonic()
            self.look()
            if self._models.replicas and preload.ident is None:
                preload.start()
            time.sleep(max(POLL_S - (time.monotonic() - began), 0.1))

    def _note_replicas(self, replicas: Sequence[ReplicaStatus]) -> None:
        """Let requests be routed by what the replicas have to do, and let in what they take."""
        silent = [each.replica for each in replicas if each.reason == SILENT]
        in_flight = {each.replica: each.requests for each in replicas if each.reason != SILENT}
        self._transport.note(in_flight, silent)
        if silent != self._silent:
            log.warning("Replicas that do not answer: %s", ", ".join(silent) or "none any more")
        self._silent = silent
        for answer in list(self._transport.answers.values()):
            answer.looked()
        if replicas:
            slots = min(sum(each.slots for each in replicas), self._most)
            queue = min(sum(each.queue for each in replicas), self._most - slots)
            self._admission.resize(slots, queue)

    def _note(self, trouble: str) -> None:
        """Log it once, not every second."""
        if trouble != self._trouble:
            log.warning("%s", trouble)
        self._trouble = trouble

    def _preload(self) -> None:
        while self._preloaded is not None:
            if self._models.status().holds(self._preloaded):  # another front was first
                self._preloaded = None
                return
            try:
                self._models.load(self._preloaded)
                self._preloaded = None
            except ApiError as error:
                self._note(f"{self._preloaded} cannot be loaded: {error.message}")
                time.sleep(POLL_S)


def with_silent(
    before: Sequence[ReplicaStatus], answers: Sequence[ReplicaStatus | None]
) -> Sequence[ReplicaStatus]:
    """The answers, and the last ones of as many as are silent now, which are not ready then."""
    spoken = [answer for answer in answers if answer is not None]
    names = {each.replica for each in spoken}
    missing = [each for each in before if each.replica not in names]
    silent = missing[: len(answers) - len(spoken)]
    spoken += [replace(each, ready=False, reason=SILENT) for each in silent]
    return sorted(spoken, key=lambda each: each.replica)


def cluster_engine(parts: Parts, transport: Transport | None = None) -> EngineSide:
    """The engine of a front. ``transport`` stands in for Ray's."""
    without_torch()
    settings = parts.settings
    ray = None
    if transport is None:
        own = [spec.name for spec in parts.registry.list() if spec.replicas and not spec.base]
        ray_runtime.prepare(settings)  # where Ray is lacking, the start ends with one line
        transport = ray = RayTransport(settings, own, lambda: watch.begin())
    models = ClusterModels(transport, parts.registry)
    encoders = ClusterModels(transport, parts.registry, encoder=True)
    watch = Watch(
        transport, models, encoders, parts.preloaded, parts.admission, settings.most_requests
    )
    embeddings = None
    if settings.enable_embeddings_backend:
        embeddings = EmbeddingModels(parts.registry, models, encoders, max(settings.max_queue, 1))

    if parts.metrics is not None:
        parts.metrics.extend = lambda page: merged(page, _pages(transport))

    def drain(grace_s: float) -> None:
        error = ServerShuttingDown("The server is shutting down", retry_after=5)
        watch.leave(error.message)
        models.refuse(error)
        parts.admission.end_after(grace_s - LAST_WORDS_S, error)

    def fault() -> str | None:
        is_used = len(parts.admission) or any(each.ready for each in models.replicas)
        if is_used or not transport.is_lost():
            return None
        return "The cluster's head was lost; restart the process to look for another one"

    return EngineSide(
        models=models,
        embeddings=embeddings,
        inspections=ClusterInspections(transport),
        text_of=models.text,
        devices=lambda: ("cpu", "cuda") if settings.cluster_replica_gpus else ("cpu",),
        ready=watch.ready,
        fault=fault,
        drain=drain,
        begin=watch.begin if ray is None else ray.connect,
    )


def _pages(transport: Transport) -> list[tuple[str, bytes]]:
    """The metrics of the replicas that give them in time."""
    try:
        pages = transport.start(transport.broadcast("metrics")).result()
        return [page for page in pages if page is not None]
    except Exception as error:
        log.warning("The replicas' metrics cannot be had: %s", error)
        return []


def without_torch() -> None:
    """Let nobody import torch in this process: it would take seconds and half a gigabyte."""
    if "torch" not in sys.modules:
        set_for_transformers()
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say so
