"""One thread that works out what may come next, while the engine reads the last token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class MaskWorker:
    """Runs jobs one after the other, on a thread that is made with the first of them."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job``, which raises nothing, soon."""
        self._jobs.put(job)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            self._jobs.get()()


worker = MaskWorker()
