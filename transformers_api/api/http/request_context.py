"""What one request holds while it is answered, and the one place where it lets go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import flask

from transformers_api.api.http import errors, request_log, sse
from transformers_api.api.http.services import Services
from transformers_api.errors import ApiError, Overloaded
from transformers_api.serving import generation
from transformers_api.serving.generation import Generation, GenerationRequest
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import LoadedModel


class Exchange:
    """A request's place among those served, its watch on its client, its lease, its generation.

    A context manager: all is let go at the end of the block, or, after ``stream``, when the
    response is closed. That is not left to the generator of the stream: one that was never
    started runs no ``finally``.
    """

    def __init__(self, known: Services, environ: dict[str, Any]) -> None:
        """Raises Overloaded where no place is free."""
        self.cancellation = Cancellation()
        self._services = known
        self._held = ExitStack()
        self._is_streaming = self._is_over = False
        self._begun: Generation | None = None
        self._record = request_log.current()
        known.admission.enter(self.cancellation)
        self._held.callback(known.admission.leave, self.cancellation)
        self._held.enter_context(known.watcher.watch(environ, self.cancellation.cancel))

    def lease(self, model_id: str | None) -> LoadedModel:
        """The model, which stays in memory; None stands for the default one."""
        name = model_id or self._services.settings.default_model
        record, began = self._record, time.monotonic()
        record.model = self._services.registry.resolve(name).name
        try:
            lease = self._services.swapper.lease(name, cancellation=self.cancellation)
        finally:
            record.model_wait_s = time.monotonic() - began
        self._held.callback(lease.release)
        return lease.model

    def start(self, model: LoadedModel, request: GenerationRequest, *, stream: bool) -> Generation:
        """Begin to generate.

        Raises TraceBusy for a trace that would be one too many, RateLimited and TooManyTokens.
        """
        known = self._services
        ends: list[Callable[[], None]] = []
        if request.trace is not None:
            ends.append(known.traces.take(known.settings.trace_max_requests))
            self._held.callback(ends[-1])
        if (reserved := known.limits.reserve(request.most_tokens)) is not None:
            ends.append(reserved.settle)
            self._held.callback(reserved.settle)
        begun = self._start(model, request, stream)
        if reserved is not None:
            reserved.used = lambda: begun.tokens_read
        if ends:  # before the client can have read the end and asks again
            begun.on_end = lambda: [end() for end in ends]
        return begun

    def _start(self, model: LoadedModel, request: GenerationRequest, stream: bool) -> Generation:
        begun = self._begun = generation.start(model, request, self.cancellation, stream=stream)
        self._held.callback(begun.close)
        texts = self._services.settings.log_prompts
        self._held.callback(self._record.note_generation, model, begun, texts)
        return begun

    def stream(self, chunks: Iterator[dict[str, Any] | None]) -> flask.Response:
        """Answer with events, ``chunks`` of what was started; None becomes a sign of life."""
        assert self._begun is not None
        frames = self._frames(chunks, flask.request.path)
        courier = self._services.courier
        return self._send(courier.carry(frames, self._begun, flask.request.environ))

    def stream_named(self, frames: Iterator[bytes | None]) -> flask.Response:
        """Answer with events that have names, the last of which ends the answer.

        What goes wrong is an ``error`` event in its place.
        """
        return self._send(self._named(frames))

    def _send(self, frames: Iterator[bytes]) -> flask.Response:
        response = sse.response(frames)
        response.call_on_close(self.close)
        self._is_streaming = self._record.is_streamed = True
        return response

    def _frames(self, chunks: Iterator[dict[str, Any] | None], path: str) -> Iterator[bytes]:
        try:
            for chunk in chunks:
                yield sse.PING if chunk is None else sse.frame(chunk)
        except Exception as error:
            # The status is out. Without [DONE] no client takes this for a complete answer.
            yield sse.frame(errors.payload(self._failed(error), path))
        else:
            self._is_over = True
            yield sse.DONE

    def _named(self, frames: Iterator[bytes | None]) -> Iterator[bytes]:
        try:
            for frame in frames:
                yield sse.PING if frame is None else frame
        except Exception as error:
            yield sse.frame(errors.failure(self._failed(error)), "error")
        else:
            self._is_over = True

    def _failed(self, error: Exception) -> ApiError:
        self._is_over = True
        known = errors.known(error)
        self._record.note_error(known)
        return known

    def close(self) -> None:
        """Abort what runs, return the lease, stop watching. Idempotent."""
        if self._is_streaming and not self._is_over:  # the stream was given up
            self._failed(self.cancellation.error)
        self._held.close()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if type(error) is Overloaded:  # by the engine, or the encoders, who know no rate
            estimate = self._services.admission.retry_after()
            error.retry_after = max(error.retry_after or 1, estimate)
        if error is not None or not self._is_streaming:
            self.close()
