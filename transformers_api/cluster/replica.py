"""One replica: the local engine with its own swapper, asked by fronts. Knows nothing of Ray.

All methods are coroutines of one event loop; what may wait for a model waits on threads. Whoever
is cancelled gives everything back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from transformers_api import logs
from transformers_api.cluster.facts import facts_of, stamp_of
from transformers_api.cluster.lines import BEAT_S, Line, Lines
from transformers_api.cluster.messages import (
    Caller,
    Failure,
    ModelFacts,
    Outputs,
    Sequences,
    TextFacts,
    Waiting,
    failure_of,
    place_of,
)
from transformers_api.config.settings import Settings
from transformers_api.engine.base import PairIds, SequenceRequest, TokenStream
from transformers_api.engine.native.installation import compilations
from transformers_api.errors import EngineDead, ModelUnloaded
from transformers_api.inspection.questions import Question
from transformers_api.local_engine import Parts, local_engine
from transformers_api.memory import process_bytes
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.loaded_model import LoadedModel, Loader
from transformers_api.serving.swap.replica_status import ReplicaStatus
from transformers_api.serving.swap.residency import Lease

T = TypeVar("T")
log = logging.getLogger(__name__)
SPARE_THREADS = 16  # for what is no sequence
PROMPT_S = 0.2  # a submit that takes longer waits for a model


class Replica:
    """See the module. ``publish`` is told the place of the resident model, as it gets requests."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        publish: Callable[[str], Any] | None = None,
        loader: Loader | None = None,
    ) -> None:
        logs.configure_logging(
            settings.log_level, settings.log_format, shows_texts=settings.log_prompts
        )
        self.name = name
        self._publish = publish
        self._settings = settings
        store = ModelStore(settings)
        registry = ModelRegistry.from_settings(settings, store.has_repo)
        self._requests = 0
        self._streams: dict[str, TokenStream] = {}
        self._lines: dict[str, Lines] = {}  # by front
        self._metrics = _metrics(settings, registry)
        parts = Parts(
            settings=settings,
            registry=registry,
            store=store,
            admission=Admission(settings.max_inflight, settings.max_queue),
            metrics=self._metrics,
            preloaded=None,
            loader=loader,
        )
        self._engine = local_engine(parts)
        if self._metrics is not None:
            self._metrics.watch(
                self._engine.models.status,
                self._engine.ready,
                lambda: self._requests,
                compilations(settings.native_cache, settings.torch_threads, settings.native_isa),
                lambda: (0, 0),
            )
        threads = settings.max_inflight + settings.max_queue + SPARE_THREADS
        self._pool = ThreadPoolExecutor(threads, "replica")
        self._engine.begin()

    async def keep(self, model: str) -> None:
        """Load the model that this replica is for. Raises ApiError."""
        await asyncio.to_thread(self._engine.models.load, model)

    async def describe(self, caller: Caller) -> ModelFacts | Failure:
        """The facts of a model, which is in memory then."""

        def read(model: LoadedModel, _: Cancellation) -> ModelFacts:
            is_beside = caller.encoder
            since = 0.0 if is_beside else self._engine.models.status().since
            return facts_of(model, time.monotonic() - since)

        return await self._with_model(caller, read)

    async def text(self, caller: Caller) -> TextFacts | Failure:
        """The tokenizer of a model, whose weights stay where they are."""

        def read(_: Cancellation) -> TextFacts:
            text = self._engine.text_of(caller.spec)
            return TextFacts(
                tokenizer=text.tokenizer,
                vocab_size=text.vocab_size,
                max_model_len=text.max_model_len,
            )

        return await self._answer(caller, read)

    async def generate(
        self, caller: Caller, sequences: Sequences
    ) -> AsyncIterator[Outputs | Failure | Waiting]:
        """The outputs of a submit: first none, once it has been accepted; or a failure at its end.

        While it waits for the model it says so again and again.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self._count, -1)
            self._count(1)
            submission = asyncio.ensure_future(self._begun(caller, sequences))
            stack.callback(_give_back, submission)
            patience = PROMPT_S
            while not (await asyncio.wait({submission}, timeout=patience))[0]:
                yield Waiting()
                patience = BEAT_S
            try:
                _, stream = submission.result()
            except Exception as error:
                yield failure_of(error)
                return
            await self._tell(caller)
            self._streams[sequences.name] = stream
            stack.callback(self._streams.pop, sequences.name, None)
            line = stack.enter_context(self._line(sequences, stream))
            yield Outputs(outputs=())
            async for message in line.messages():
                yield message

    async def abort(self, name: str, index: int) -> bool:
        """Stop one sequence of those that were submitted under ``name``; False: they are not here.

        Its ABORT output follows in the stream.
        """
        stream = self._streams.get(name)
        if stream is not None:
            stream.abort(index)
        return stream is not None

    async def ask(self, caller: Caller, question: Question[T]) -> T | Failure:
        """The answer to a question about given tokens."""
        inspections = self._engine.inspections

        def run(model: LoadedModel, cancellation: Cancellation) -> T:
            return inspections.ask(model, question, cancellation)

        return await self._with_model(caller, run)

    async def embed(
        self,
        caller: Caller,
        rows: Sequence[Sequence[int]],
        dimensions: int | None,
        normalize: bool | None,
        prompt_tokens: Sequence[int],
    ) -> list[bytes] | Failure:
        """See serving.swap.Embedder."""

        def run(model: LoadedModel, _: Cancellation) -> list[bytes]:
            assert model.embedder is not None
            options = {"prompt_tokens": prompt_tokens} if prompt_tokens else {}
            return model.embedder.embed(rows, dimensions, normalize, **options)

        return await self._with_model(caller, run)

    async def score(self, caller: Caller, pairs: Sequence[PairIds]) -> list[float] | Failure:
        """See serving.swap.PairScorer."""

        def run(model: LoadedModel, _: Cancellation) -> list[float]:
            assert model.scorer is not None
            return model.scorer.score(pairs)

        return await self._with_model(caller, run)

    async def load(self, caller: Caller, device: str | None) -> bool | Failure:
        """See Swapper.load."""

        def run(cancellation: Cancellation) -> bool:
            return self._engine.models.load(
                caller.spec.name,
                device=device,
                client=caller.client,
                cancellation=cancellation,
            )

        answer = await self._answer(caller, run)
        if not isinstance(answer, Failure):
            await self._tell(caller)
        return answer

    async def evict(self, model_id: str | None, encoder: bool) -> bool | Failure:
        """See Swapper.evict; of the encoder beside, too."""
        if encoder:
            embeddings = self._engine.embeddings
            if embeddings is None or embeddings.encoder is None:
                return False
            is_asked_for = model_id in (None, embeddings.encoder)
            return is_asked_for and await asyncio.to_thread(embeddings.give_back, 0)
        try:
            return await asyncio.to_thread(self._engine.models.evict, model_id)
        except Exception as error:
            return failure_of(error)

    async def status(self) -> ReplicaStatus:
        """A snapshot; never waits."""
        ready, reason = self._engine.ready()
        swapper = self._engine.models.status()
        return ReplicaStatus(
            replica=self.name,
            node=socket.gethostname(),
            pid=os.getpid(),
            swapper=swapper,
            age_s=time.monotonic() - swapper.since,
            requests=self._requests,
            ready=ready,
            reason=reason,
            process_bytes=process_bytes(),
            slots=self._settings.max_inflight,
            queue=self._settings.max_queue,
            encoder=self._engine.embeddings.encoder if self._engine.embeddings else None,
        )

    async def metrics(self) -> tuple[str, bytes]:
        """(the replica's name, its metrics in Prometheus' text format)."""
        page = b"" if self._metrics is None else self._metrics.page()[0]
        return self.name, page

    def check_health(self) -> None:
        """The heartbeat. Raises EngineDead where only a restart of the process helps."""
        if (fault := self._engine.fault()) is not None:
            raise EngineDead(fault)

    # What they share.

    @contextmanager
    def _line(self, sequences: Sequences, stream: TokenStream) -> Iterator[Line]:
        """The way of the outputs to the front, together with those of its other answers."""
        front = sequences.front or sequences.name
        lines = self._lines.setdefault(front, Lines())
        try:
            with lines.line(sequences, stream) as line:
                yield line
        finally:
            if not len(lines):
                self._lines.pop(front, None)

    def _count(self, requests: int) -> None:
        self._requests += requests

    async def _with_model(
        self, caller: Caller, work: Callable[[LoadedModel, Cancellation], T]
    ) -> T | Failure:
        try:
            lease = await self._lease(caller)
        except Exception as error:
            return failure_of(error)
        try:
            await self._tell(caller)
            return await self._answer(caller, lambda end: work(self._same(lease, caller), end))
        finally:
            lease.release()

    async def _answer(self, caller: Caller, work: Callable[[Cancellation], T]) -> T | Failure:
        try:
            return await self._on_thread(caller, work)
        except Exception as error:
            return failure_of(error)

    async def _lease(self, caller: Caller) -> Lease:
        """The lease, which is released by whoever gets it: also where nobody waits any more."""
        return await self._on_thread(caller, partial(self._leased, caller), undo=Lease.release)

    def _leased(self, caller: Caller, cancellation: Cancellation) -> Lease:
        if not caller.encoder:
            return self._engine.models.lease(
                caller.spec, client=caller.client, cancellation=cancellation
            )
        models = self._engine.embeddings
        assert models is not None
        held = models.lease(caller.spec.name, cancellation, caller.client, scores=True)
        model = held.__enter__()

        def let_go() -> None:
            held.__exit__(None, None, None)

        return Lease(model, let_go)

    async def _begun(self, caller: Caller, sequences: Sequences) -> tuple[Lease, TokenStream]:
        """A lease and the stream of what was submitted with it; see ``_give_back``.

        Both on one thread: a first token waits for every hop.
        """

        def begin(cancellation: Cancellation) -> tuple[Lease, TokenStream]:
            lease = self._leased(caller, cancellation)
            try:
                return lease, self._submitted(lease.model, caller, sequences)
            except BaseException:
                lease.release()
                raise

        return await self._on_thread(caller, begin, _end)

    async def _on_thread(
        self,
        caller: Caller,
        work: Callable[[Cancellation], T],
        undo: Callable[[T], object] = lambda _: None,
    ) -> T:
        """The result of ``work``, which is told of a cancellation; ``undo`` is for one too late."""
        cancellation = Cancellation()

        def run() -> T:
            before = logs.request_id.set(caller.request_id)
            try:
                return work(cancellation)
            finally:
                logs.request_id.reset(before)

        future = self._pool.submit(run)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            cancellation.cancel()
            future.add_done_callback(
                lambda done: None if done.cancelled() or done.exception() else undo(done.result())
            )
            raise

    async def _tell(self, caller: Caller) -> None:
        if self._publish is not None and not caller.encoder:
            await self._publish(place_of(caller.spec))

    def _same(self, lease: Lease, caller: Caller) -> LoadedModel:
        """The model. Raises ModelUnloaded where it is not the one that the request was made for."""
        model = lease.model
        if caller.stamp is not None and caller.stamp != stamp_of(model):
            raise ModelUnloaded("The model has changed meanwhile; ask again", retry_after=1)
        return model

    def _submitted(self, model: LoadedModel, caller: Caller, sequences: Sequences) -> TokenStream:
        if caller.stamp is not None and caller.stamp != stamp_of(model):
            raise ModelUnloaded("The model has changed meanwhile; ask again", retry_after=1)
        log.info("Answering with %s", model.spec.name)  # and the request's id
        requests: list[SequenceRequest] = []
        for request, plan in zip(sequences.requests, sequences.constraints, strict=True):
            constraint = None if plan is None else plan.start(model.compiler, model.vocabulary)
            requests.append(replace(request, constraint=constraint, client=caller.client))
        return model.engine.submit(requests, observe=sequences.observe)


def _end(submitted: tuple[Lease, TokenStream]) -> None:
    lease, stream = submitted
    stream.abort()
    lease.release()


def _give_back(submission: asyncio.Future[tuple[Lease, TokenStream]]) -> None:
    """End what a submission has, or will have: whoever waited for it may have left meanwhile."""
    if not submission.cancel() and submission.exception() is None:
        _end(submission.result())


def _metrics(settings: Settings, registry: ModelRegistry) -> Any:
    from transformers_api.metrics import Metrics

    return Metrics([spec.name for spec in registry.list()]) if settings.metrics_allowed else None
