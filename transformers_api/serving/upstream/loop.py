"""One event loop on a thread of its own, for requests to others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from transformers_api.errors import Unavailable
from transformers_api.serving.limits.cancellation import Cancellation

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines. From any thread; its own starts with the first of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``work``; cancelling the future cancels it wherever it stands."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name=self._name, daemon=True
                ).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def result(future: Future[T], cancellation: Cancellation) -> T:
    """The result of ``future``, which a cancellation ends. Raises the reason of that."""
    cancellation.on_cancel(lambda: give_up(future))
    try:
        return future.result()
    except CancelledError:
        cancellation.check()
        raise Unavailable("The answer was given up") from None


def give_up(future: Future[Any]) -> None:
    """Cancel ``future``."""
    future.cancel()
