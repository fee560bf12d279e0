"""A model that an upstream answers for, as the rest of the program knows models.

Its engine meets ``engine.base.Engine`` and refuses what needs tokens, which no upstream shows: by
name, as ModelNotCapable. Text comes through ``relay``, as the same ``Generation`` as from an
engine of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar, cast

import httpx2

from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.base import (
    NOTHING,
    ContextOverflow,
    Engine,
    EngineFacts,
    EngineListener,
    EngineStats,
    FinishReason,
    SequenceRequest,
    TokenOutput,
    TokenStream,
)
from transformers_api.errors import ApiError, ModelNotCapable, UpstreamFailed
from transformers_api.serving.generation import Generation, GenerationRequest, Usage
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec, UpstreamSource
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.choice_text import ChoiceText, TextDelta
from transformers_api.serving.upstream.chunks import DONE, ChunkReader, ended
from transformers_api.serving.upstream.connection import (
    MAX_WHOLE_BYTES,
    UpstreamConnections,
    read_events,
    read_whole,
    transport_error,
)
from transformers_api.serving.upstream.loop import result
from transformers_api.serving.upstream.spec import UpstreamCall, UpstreamUsage

T = TypeVar("T")
UNBOUNDED = 1 << 24  # tokens: an upstream keeps to its own context
EVENT_STREAM = "text/event-stream"
LAST_BYTES_S = 1.0


class UpstreamEngine:
    """Meets ``engine.base.Engine`` for a model elsewhere, which has no tokens here."""

    eos_token_ids: frozenset[int] = frozenset()
    context_overflow: ContextOverflow = None
    vocab_size = 0

    def __init__(self, spec: ModelSpec) -> None:
        self.max_model_len = spec.max_context_tokens or UNBOUNDED
        self._name = spec.name

    def submit(
        self, requests: Sequence[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        """Raises ModelNotCapable."""
        raise self._refusal("takes no token ids")

    def call(self, visit: Callable[[Any], T]) -> Future[T]:
        """Raises ModelNotCapable."""
        raise self._refusal("cannot be looked into")

    def adapted(
        self,
        source: AdapterSource,
        *,
        listener: EngineListener | None = None,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> Engine:
        """Raises ModelNotCapable."""
        raise self._refusal("takes no adapters")

    def evict_adapter(self, name: str) -> bool:
        """See base.Engine."""
        return False

    def describe(self) -> EngineFacts:
        """See base.Engine."""
        return EngineFacts(device="upstream", dtype="unknown", bytes=0, mode="upstream")

    def stats(self) -> EngineStats:
        """See base.Engine."""
        return EngineStats(mode="upstream")

    def close(self, error: ApiError | None = None) -> None:
        """See base.Engine. There is nothing to give back."""

    def _refusal(self, reason: str) -> ModelNotCapable:
        return ModelNotCapable(
            f"Model '{self._name}' is served by an upstream: it {reason}", param="model"
        )


class UpstreamChoice:
    """Stands for ``ChoiceText`` where the text comes as such."""

    def __init__(self) -> None:
        self.finished = False
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.mean_logprob = 0.0
        self.token_ids: list[int] = []

    def take(self, output: TokenOutput) -> TextDelta:
        """The piece in ``output``."""
        delta: TextDelta = output.extras["delta"]
        self.finished = delta.finish_reason is not None
        return delta


class UpstreamGeneration(Generation):
    """A Generation whose tokens an upstream has counted."""

    def __init__(
        self, request: GenerationRequest, stream: TokenStream, counted: UpstreamUsage
    ) -> None:
        choices = [UpstreamChoice() for _ in range(len(request.prompts) * request.n)]
        super().__init__(request, cast("list[ChoiceText]", choices), stream)
        self._tokens = counted

    @property
    def usage(self) -> Usage:
        """See Generation."""
        tokens = self._tokens
        return Usage(tokens.prompt_tokens, tokens.completion_tokens, tokens.cached_tokens)

    @property
    def tokens_read(self) -> int:
        """See Generation."""
        return self._tokens.prompt_tokens + self._tokens.completion_tokens


class UpstreamModels:
    """Makes the models that registry entries name, and asks their upstreams. From any thread."""

    def __init__(self, connections: UpstreamConnections | None = None) -> None:
        self._connections = connections or UpstreamConnections()

    def model(self, spec: ModelSpec) -> LoadedModel:
        """The model of an entry with an upstream; nobody is asked for it."""
        upstream = spec.upstream
        assert upstream is not None

        def relay(request: GenerationRequest, cancellation: Cancellation) -> Generation:
            return self._relay(upstream, request, cancellation)

        return LoadedModel(
            spec=spec,
            engine=UpstreamEngine(spec),
            tokenizer=None,
            device="upstream",
            dtype="unknown",
            bytes=0,
            load_s=0.0,
            fingerprint="upstream",
            relay=relay,
        )

    def ask(self, spec: ModelSpec, call: UpstreamCall, cancellation: Cancellation) -> bytes:
        """The whole body of an answer that is no text, such as vectors. Raises ApiError."""
        assert spec.upstream is not None
        future = self._connections.start(self._whole(spec.upstream, call))
        return result(future, cancellation)

    def _relay(
        self, upstream: UpstreamSource, request: GenerationRequest, cancellation: Cancellation
    ) -> Generation:
        assert request.upstream is not None
        count = len(request.prompts) * request.n
        answer = _Answer(self._connections, upstream, request.upstream, count)
        generation = UpstreamGeneration(request, answer.stream, answer.reader.usage)
        cancellation.on_cancel(lambda: generation.close(cancellation.error))
        answer.begin(cancellation)
        return generation

    async def _whole(self, upstream: UpstreamSource, call: UpstreamCall) -> bytes:
        response = await self._connections.post(upstream, call.route, call.body)
        pace = self._connections.pace(upstream)
        try:
            return await read_whole(response, MAX_WHOLE_BYTES, pace)
        except httpx2.HTTPError as error:
            raise transport_error(error) from None
        finally:
            await response.aclose()


class _Answer:
    """One answer on its way. ``stream`` is filled on the thread of the connections."""

    def __init__(
        self,
        connections: UpstreamConnections,
        upstream: UpstreamSource,
        call: UpstreamCall,
        choices: int,
    ) -> None:
        self.reader = ChunkReader(choices)
        self.stream = TokenStream(choices, self._abort)
        self._choices = choices
        self._accepted: Future[None] = Future()
        self._future: Future[None] | None = None
        self._connections = connections
        self._upstream, self._call = upstream, call

    def begin(self, cancellation: Cancellation) -> None:
        """Ask, and wait until the upstream has accepted. Raises what it refuses with."""
        future = self._future = self._connections.start(self._run())
        try:
            result(self._accepted, cancellation)
        except BaseException:
            future.cancel()
            raise

    def _abort(self, index: int | None) -> None:
        if index is None and self._future is not None:  # of one choice: its text is left out
            self._future.cancel()

    async def _run(self) -> None:
        try:
            body = {**self._call.body, "stream": True, "stream_options": {"include_usage": True}}
            response = await self._connections.post(self._upstream, self._call.route, body)
            try:
                await self._read(response)
            except httpx2.HTTPError as error:
                raise transport_error(error) from None
            finally:
                await response.aclose()
        except asyncio.CancelledError:
            self._accepted.cancel()
            raise
        except Exception as error:
            self._fail(error)

    async def _read(self, response: httpx2.Response) -> None:
        kind = response.headers.get("Content-Type", "")
        if not kind.startswith(EVENT_STREAM):
            raise UpstreamFailed(f"The upstream sends no {EVENT_STREAM}")
        self._accepted.set_result(None)
        events = read_events(response, self._connections.pace(self._upstream))
        async for data in events:
            if data == DONE:
                break
            for delta in self.reader.read(data):
                self.stream.put(ended(delta))
            if self.stream.is_overfull:
                self.stream.overrun = True
                self.stream.wake()
                return
        for delta in self.reader.finish():
            self.stream.put(ended(delta))
        with suppress(TimeoutError):  # read to its end, the connection serves again
            async with asyncio.timeout(LAST_BYTES_S):
                async for _ in events:
                    pass

    def _fail(self, error: Exception) -> None:
        failure = error
        if not isinstance(error, ApiError):
            failure = UpstreamFailed(f"The upstream cannot be read ({type(error).__name__})")
        if not self._accepted.done():
            self._accepted.set_exception(failure)
            return
        assert isinstance(failure, ApiError)
        for index in range(self._choices):
            self.stream.put(
                TokenOutput(index=index, finish_reason=FinishReason.ERROR, error=failure)
            )
