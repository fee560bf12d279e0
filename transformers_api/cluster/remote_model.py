"""A model in a replica, as the rest of the program knows models: no weight of it is here."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any, TypeVar

from transformers_api import logs
from transformers_api.cluster.messages import (
    Caller,
    Failure,
    ModelFacts,
    Outputs,
    Sequences,
    Waiting,
    error_of,
    note_tallies,
    place_of,
    unpacked,
)
from transformers_api.cluster.transport import Transport, ask
from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.base import (
    BACKLOG,
    NOTHING,
    OBSERVED_BACKLOG,
    ContextOverflow,
    Engine,
    EngineFacts,
    EngineListener,
    EngineStats,
    FinishReason,
    PairIds,
    SequenceRequest,
    TokenOutput,
    TokenStream,
)
from transformers_api.errors import (
    ApiError,
    EngineFailed,
    ModelNotCapable,
    ModelUnloaded,
    ReplicaFailed,
)
from transformers_api.inspection.base import Anatomy
from transformers_api.serving.constraints.plan import plan_of
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import AdaptedModel, Embedder, LoadedModel
from transformers_api.serving.text.token_counts import token_counter
from transformers_api.serving.upstream.loop import result

T = TypeVar("T")
log = logging.getLogger(__name__)
SILENT_LOOKS = 20  # a second and more apart, without a message between them: the replica is gone


class RemoteEngine:
    """Meets ``engine.base.Engine`` for one request: ``cancellation`` is its own."""

    def __init__(
        self,
        transport: Transport,
        caller: Caller,
        facts: ModelFacts,
        cancellation: Cancellation,
        on_stale: Callable[[], None] = lambda: None,
    ) -> None:
        self._transport = transport
        self._caller = caller
        self._facts = facts
        self._cancellation = cancellation
        self._on_stale = on_stale

    @property
    def max_model_len(self) -> int:
        """See base.Engine."""
        return self._facts.max_model_len

    @property
    def context_overflow(self) -> ContextOverflow:
        """See base.Engine."""
        return self._facts.context_overflow

    @property
    def vocab_size(self) -> int:
        """See base.Engine."""
        return self._facts.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See base.Engine."""
        return self._facts.eos_token_ids

    def submit(
        self, requests: Sequence[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        """See base.Engine. Waits until a replica has the model and has taken the sequences."""
        plans = [None if each.constraint is None else plan_of(each.constraint) for each in requests]
        sent = [replace(each, constraint=None, listener=None) for each in requests]
        client = requests[0].client if requests else ""
        answer = _Answer(
            self._transport,
            replace(self._caller, client=client or self._caller.client),
            Sequences(
                requests=sent,
                constraints=plans,
                observe=dict(observe),
                name=uuid.uuid4().hex,
                front=self._transport.name,
            ),
        )
        try:
            answer.begin(self._cancellation)
        except ModelUnloaded:
            self._on_stale()
            raise
        return answer.stream

    def call(self, visit: Callable[[Any], T]) -> Future[T]:
        """Raises ModelNotCapable: what visits a model has to be a question, which travels."""
        raise ModelNotCapable(f"Model '{self._caller.spec.name}' is in another process")

    def adapted(
        self,
        source: AdapterSource,
        *,
        listener: EngineListener | None = None,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> Engine:
        """Raises ModelNotCapable: replicas apply adapters, by the entry that is asked for."""
        raise ModelNotCapable("Adapters are applied where the model is", param="model")

    def evict_adapter(self, name: str) -> bool:
        """See base.Engine."""
        return False

    def describe(self) -> EngineFacts:
        """See base.Engine."""
        return self._facts.engine

    def stats(self) -> EngineStats:
        """See base.Engine; those of replicas are in their status."""
        return EngineStats(mode=self._facts.engine.mode)

    def close(self, error: ApiError | None = None) -> None:
        """See base.Engine. Replicas close their own."""


class _Answer:
    """The outputs of one submit on their way. ``stream`` is filled on the transport's loop."""

    def __init__(self, transport: Transport, caller: Caller, sequences: Sequences) -> None:
        count = len(sequences.requests)
        limit = OBSERVED_BACKLOG if sequences.observe else BACKLOG
        self.stream = TokenStream(count, self._abort, limit)
        self._transport, self._caller, self._sequences = transport, caller, sequences
        self._accepted: Future[None] = Future()
        self._open = set(range(count))
        self._taken = 0  # outputs that are in the stream
        self._early: list[
            tuple[int, Sequence[TokenOutput]]
        ] = []  # of which some before are not here
        self._future: Future[None] | None = None
        self._looks: int | None = None  # since its last message; None: there was none
        self._is_lost = False

    def begin(self, cancellation: Cancellation) -> None:
        """Ask, and wait until it is accepted. Raises what it is refused with."""
        future = self._future = self._transport.start(self._run())
        try:
            result(self._accepted, cancellation)
        except BaseException:
            future.cancel()
            raise

    def _abort(self, index: int | None) -> None:
        if index is not None:  # the others go on
            self._open.discard(index)
        if index is None or not self._open:
            if self._future is not None:
                self._future.cancel()
        else:
            abort = self._transport.broadcast("abort", self._sequences.name, index)
            self._transport.start(abort)

    async def _run(self) -> None:
        name, answers = self._sequences.name, self._transport.answers
        answers[name] = self
        try:
            place = place_of(self._caller.spec)
            messages = self._transport.stream("generate", place, self._caller, self._sequences)
            async with aclosing(messages):
                async for message in messages:
                    self._looks = 0
                    if isinstance(message, Waiting):
                        continue
                    if isinstance(message, Failure):
                        raise error_of(message)
                    self._take(message)
                    if self.stream.overrun:
                        return
            if self._open:
                raise ReplicaFailed("The replica ended the answer before it was complete")
        except asyncio.CancelledError:
            if not self._is_lost:
                raise
            self._fail(ReplicaFailed("The replica of this answer is silent", retry_after=1))
        except Exception as error:
            self._fail(error)
        finally:
            del answers[name]

    def _take(self, message: Outputs) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)
        note_tallies(self._sequences.requests, message)
        self._put(message.position, [*map(_plain, message.again), *unpacked(message)])
        for name, (position, ids) in message.carried.items():
            if (other := self._transport.answers.get(name)) is not None:
                other.carried(position, ids)

    def looked(self) -> None:
        """See transport.Answer."""
        if self._looks is None:
            return
        self._looks += 1
        if self._looks > SILENT_LOOKS and self._future is not None:
            self._is_lost = True
            self._future.cancel()

    def carried(self, position: int, ids: Sequence[int]) -> None:
        """Take tokens that came with another answer."""
        self._put(position, list(map(_plain, ids)))
        if self.stream.overrun and self._future is not None:
            self._future.cancel()

    def _put(self, position: int, outputs: Sequence[TokenOutput]) -> None:
        """Put them into the stream, in order and once, however often they come."""
        if position > self._taken:
            self._early.append((position, outputs))
            return
        for output in outputs[self._taken - position :]:
            self._taken += 1
            if output.finish_reason is not None:
                self._open.discard(output.index)
            self.stream.put(output)
        early, self._early = self._early, []
        for each in early:
            self._put(*each)
        if self.stream.is_overfull and not self.stream.overrun:
            self.stream.overrun = True
            self.stream.wake()

    def _fail(self, error: Exception) -> None:
        failure = error if isinstance(error, ApiError) else EngineFailed("A replica failed")
        if failure is not error:
            log.error("An answer of a replica cannot be read", exc_info=error)
        if not self._accepted.done():
            self._accepted.set_exception(failure)
            return
        for index in sorted(self._open):
            self.stream.put(
                TokenOutput(index=index, finish_reason=FinishReason.ERROR, error=failure)
            )


def _plain(token_id: int) -> TokenOutput:
    return TokenOutput(token_id=token_id)


class RemoteInspector:
    """Meets ``questions.Inspected``, for a model elsewhere, to which questions travel."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy

    @property
    def anatomy(self) -> Anatomy:
        """See Inspected."""
        return self._anatomy


class RemoteEmbedder:
    """Meets ``serving.swap.Embedder`` and ``PairScorer``."""

    def __init__(
        self, transport: Transport, caller: Caller, facts: ModelFacts, cancellation: Cancellation
    ) -> None:
        self.dimensions = facts.dimensions or 0
        self.slice_tokens = facts.slice_tokens
        self._transport, self._caller = transport, caller
        self._cancellation = cancellation

    def on(self, engine: Engine) -> Embedder:
        """See Embedder: the entry that is asked for says which adapter."""
        return self

    def embed(
        self,
        rows: Sequence[Sequence[int]],
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt_tokens: Sequence[int] = (),
    ) -> list[bytes]:
        """See Embedder."""
        vectors: list[bytes] = self._ask("embed", rows, dimensions, normalize, prompt_tokens)
        return vectors

    def score(self, pairs: Sequence[PairIds]) -> list[float]:
        """See PairScorer."""
        scores: list[float] = self._ask("score", pairs)
        return scores

    def _ask(self, method: str, *arguments: Any) -> Any:
        place = "" if self._caller.encoder else place_of(self._caller.spec)
        return ask(self._transport, self._cancellation, method, place, self._caller, *arguments)


def remote_base(transport: Transport, spec: ModelSpec, facts: ModelFacts) -> LoadedModel:
    """The model of ``facts``, for all requests: what its tokenizer makes is made once."""
    engine = RemoteEngine(transport, Caller(spec=spec), facts, Cancellation())
    return LoadedModel(
        spec=spec,
        engine=engine,
        tokenizer=facts.tokenizer,
        device=facts.engine.device,
        dtype=facts.engine.dtype,
        quantization=facts.engine.quantization,
        kernels=facts.engine.kernels,
        isa=facts.engine.isa,
        bytes=facts.engine.bytes,
        load_s=facts.load_s,
        fingerprint=facts.fingerprint,
        file_types=facts.file_types,
        created=facts.created,
        count_tokens=token_counter(spec.token_encoding) if spec.token_encoding else None,
        prompts=facts.prompts,
        pools_prompts=facts.pools_prompts,
        similarity=facts.similarity,
        inspector=None if facts.anatomy is None else RemoteInspector(facts.anatomy),
    )


def remote_model(
    transport: Transport,
    base: LoadedModel,
    caller: Caller,
    facts: ModelFacts,
    cancellation: Cancellation,
    on_stale: Callable[[], None],
) -> LoadedModel:
    """The same for one request, with an engine that its cancellation reaches.

    ``on_stale`` is called where the replica has another model under this name.
    """
    caller = replace(caller, stamp=facts.stamp, request_id=logs.request_id.get())
    maker = RemoteEmbedder(transport, caller, facts, cancellation)
    own = {each.name: getattr(base, each.name) for each in fields(LoadedModel)}
    own |= {
        "engine": RemoteEngine(transport, caller, facts, cancellation, on_stale),
        "embedder": maker if facts.dimensions is not None else None,
        "scorer": maker if facts.scores else None,
    }
    return AdaptedModel(**own, base=base)
