"""One request's wish to stop, raised from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transformers_api.errors import ApiError, ClientGone


class Cancellation:
    """Set once, from any thread; who waits or works for the request registers what to do then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._error: ApiError | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether the request is to end early."""
        return self._error is not None

    @property
    def error(self) -> ApiError:
        """Why it ends: ClientGone unless ``cancel`` was told something else."""
        return self._error or _client_gone()

    def cancel(self, error: ApiError | None = None) -> None:
        """Run every callback once. Idempotent; the first reason holds."""
        with self._lock:
            self._error = self._error or error or _client_gone()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on cancellation; at once when it has already come."""
        with self._lock:
            if self._error is None:
                self._callbacks.append(callback)
                return
        callback()

    def check(self) -> None:
        """Raise the reason after cancellation."""
        if self._error is not None:
            raise self._error


def _client_gone() -> ClientGone:
    return ClientGone("The client closed the connection")
