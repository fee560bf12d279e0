"""One thread that works out what may come next, while the engine reads the last token."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress


class MaskWorker:
    """Runs jobs one after the other, on a thread that is made with the first of them."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # threads stay with the parent

    def _reset(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` soon; what it raises is lost."""
        self._jobs.put(job)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            with suppress(BaseException):  # a panic of Rust is no Exception
                self._jobs.get()()


worker = MaskWorker()
