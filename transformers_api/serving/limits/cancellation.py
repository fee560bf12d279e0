"""One request's wish to stop, raised from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers_api.errors import ApiError, ClientGone


@dataclass(eq=False, slots=True)
class Cancellation:
    """Set once, from any thread; who waits or works for the request registers what to do then."""

    is_cancelled: bool = False  # the request is to end early
    _error: ApiError | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _callbacks: list[Callable[[], None]] = field(default_factory=list)

    @property
    def error(self) -> ApiError:
        """The reason: ClientGone unless ``cancel`` was given another one."""
        return self._error or _client_gone()

    def cancel(self, error: ApiError | None = None) -> None:
        """Run every callback once. Idempotent; the first reason holds."""
        with self._lock:
            self._error = self._error or error or _client_gone()
            self.is_cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on cancellation; at once when it has already come."""
        with self._lock:
            if not self.is_cancelled:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self) -> None:
        """Let go of the callbacks, which know what belongs to the request: it is over."""
        with self._lock:
            self._callbacks = []

    def check(self) -> None:
        """Raise the reason after cancellation."""
        if self.is_cancelled:
            raise self.error


def _client_gone() -> ClientGone:
    return ClientGone("The client closed the connection")
