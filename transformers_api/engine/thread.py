"""The one thread that makes torch calls: loading, decoding, evicting.

A second thread in torch would have a thread pool of its own and halve the speed on a CPU
(docs/decisions/0003-one-engine-thread.md). This module itself loads no torch until the thread
runs.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from transformers_api import logs
from transformers_api.engine.platform.lazy_torch import import_torch
from transformers_api.errors import EngineDead

T = TypeVar("T")
log = logging.getLogger(__name__)


class Steppable(Protocol):
    """An engine, as its thread sees it."""

    @property
    def has_work(self) -> bool:
        """True where ``step`` would do something."""
        ...

    def step(self) -> None:
        """One forward pass. Must not raise for an error that the next step may not have."""
        ...

    def fail(self, error: EngineDead) -> None:
        """The thread is dead: end every sequence."""
        ...


class EngineThread:
    """Runs calls and steps, in turn, for as long as the process lives.

    ``inbox`` is the one way in. When the thread ends, for whatever reason, every caller gets
    EngineDead, then and later. ``lazy_torch``: see ``lazy_torch.py``.
    """

    def __init__(self, num_threads: int | None = None, *, lazy_torch: bool = True) -> None:
        self.num_threads = num_threads
        self.lazy_torch = lazy_torch
        self.engines: list[Steppable] = []
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: list[Future[Any]] = []
        self._alive = True
        self._step_since: float | None = None  # time.monotonic() when the running one began
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False once the thread has ended: the process must be restarted."""
        return self._alive

    @property
    def step_s(self) -> float:
        """Seconds that the step which runs now has taken so far; 0 where none does."""
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    def post(self, action: Callable[[], None], future: Future[Any] | None = None) -> None:
        """Run ``action`` on the thread, soon. Raises EngineDead."""
        with self._lock:  # so that nothing is posted after the dead thread's last look
            if not self._alive:
                raise EngineDead("The engine has stopped")
            self._inbox.put(action)
            if future is not None:
                self._pending = [other for other in self._pending if not other.done()]
                self._pending.append(future)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` on the thread between two steps; its log lines are its caller's."""
        future: Future[T] = Future()
        function = logs.carried(function)

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        try:
            self.post(run, future)
        except EngineDead as error:
            future.set_exception(error)
        return future

    def stop(self) -> None:
        """End the thread after what was posted before."""
        with self._lock:
            if self._alive:
                self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            import_torch(lazy=self.lazy_torch)
            import torch

            torch.set_grad_enabled(False)
            if self.num_threads:
                torch.set_num_threads(self.num_threads)
            with torch.inference_mode():
                self._loop()
        except BaseException:
            log.exception("The engine thread has died")
        finally:
            self._die()

    def _loop(self) -> None:
        while self._read_inbox(wait=not any(engine.has_work for engine in self.engines)):
            for engine in list(self.engines):
                if engine.has_work:
                    self._step_since = time.monotonic()
                    engine.step()
                    self._step_since = None

    def _read_inbox(self, wait: bool) -> bool:
        """Run what has been posted so far; False to end.

        What is posted meanwhile comes after the next step: a long visit in many slices never keeps
        those who are being answered waiting for more than one of them.
        """
        for _ in range(max(self._inbox.qsize(), wait)):
            action = self._inbox.get()  # nobody else takes from it
            if action is None:
                return False
            action()
        return True

    def _die(self) -> None:
        with self._lock:
            self._alive = False
            pending = self._pending
        error = EngineDead("The engine has stopped")
        for engine in self.engines:
            engine.fail(error)
        for future in pending:
            if not future.done():
                future.set_exception(error)
