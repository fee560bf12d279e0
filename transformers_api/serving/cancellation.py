"""One request's wish to stop, raised from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transformers_api.errors import ClientGone


class Cancellation:
    """Set once, from any thread; who waits or works for the request registers what to do then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._cancelled

    def cancel(self) -> None:
        """Run every callback once. Idempotent."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on cancellation; at once when it has already come."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()

    def check(self) -> None:
        """Raise ClientGone after cancellation."""
        if self._cancelled:
            raise ClientGone("The client closed the connection")
