"""What one request holds while it is answered, and the one place where it lets go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import flask

from transformers_api.api import errors, sse
from transformers_api.api.services import Services
from transformers_api.serving import generation
from transformers_api.serving.cancellation import Cancellation
from transformers_api.serving.generation import Generation, GenerationRequest
from transformers_api.serving.models import LoadedModel


class Exchange:
    """A request's watch on its client, its lease on a model, its generation.

    A context manager: all is let go at the end of the block, or, after ``stream``, when the
    response is closed. That is not left to the generator of the stream: one that was never
    started runs no ``finally``.
    """

    def __init__(self, known: Services, environ: dict[str, Any]) -> None:
        self.cancellation = Cancellation()
        self._services = known
        self._held = ExitStack()
        self._is_streaming = False
        self._held.enter_context(known.watcher.watch(environ, self.cancellation.cancel))

    def lease(self, model_id: str | None) -> LoadedModel:
        """The model, which stays in memory; None stands for the default one."""
        name = model_id or self._services.settings.default_model
        lease = self._services.swapper.lease(name, cancellation=self.cancellation)
        self._held.callback(lease.release)
        return lease.model

    def start(self, model: LoadedModel, request: GenerationRequest, *, stream: bool) -> Generation:
        """Begin to generate."""
        begun = generation.start(model, request, self.cancellation, stream=stream)
        self._held.callback(begun.close)
        return begun

    def stream(self, chunks: Iterator[dict[str, Any] | None]) -> flask.Response:
        """Answer with events; None among ``chunks`` becomes a sign of life."""
        response = sse.response(_frames(chunks, flask.request.path))
        response.call_on_close(self.close)
        self._is_streaming = True
        return response

    def close(self) -> None:
        """Abort what runs, return the lease, stop watching. Idempotent."""
        self._held.close()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None or not self._is_streaming:
            self.close()


def _frames(chunks: Iterator[dict[str, Any] | None], path: str) -> Iterator[bytes]:
    try:
        for chunk in chunks:
            yield sse.PING if chunk is None else sse.frame(chunk)
    except Exception as error:
        # The status is out. Without [DONE] no client takes this for a complete answer.
        yield sse.frame(errors.payload(errors.known(error), path))
    else:
        yield sse.DONE
