"""The worker process: how it ends in order, and when it has to end by itself."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import time
from typing import Any, NoReturn

from gunicorn.workers.gthread import TConn  # type: ignore[import-untyped]

from transformers_api.engine.platform.imports import map_torch
from transformers_api.server.connections import GatheringWorker
from transformers_api.server.systemd import Notifier

IDLE_LINGER_S = 0.5  # a request may be on its way on a connection that was kept open
LAST_WORDS_S = 2.0  # for clients to hear of a fault, before the process ends of it
PING_S = 1.0  # between two signs of life to systemd
SUCCESSOR_S = 1.0  # before that, from when on connections wait for the next process
FAULTY = 70  # exit status
ARENA_MAX, ARENAS = -8, 2  # mallopt
MMAP_THRESHOLD, LARGE = -3, 1 << 17  # bytes; said, or glibc learns to keep larger ones, too

log = logging.getLogger(__name__)


class DrainWorker(GatheringWorker):
    """Ends in order: no new connection, no cut answer, no long wait.

    Where the engine has stopped or hangs, it ends by itself, and the arbiter starts another one.
    """

    maps_torch = True  # a model runs in this process
    notifier = Notifier(None)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._draining = False
        self._ends_at: float | None = None  # time.monotonic(), after a fault
        self._pinged = 0.0

    def init_process(self) -> None:
        """Before the first thread: few heaps, as each keeps what its threads once held.

        What is large is given back when it is freed.
        """
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        if mallopt:
            mallopt(ARENA_MAX, ARENAS)
            mallopt(MMAP_THRESHOLD, LARGE)
        super().init_process()

    def load_wsgi(self) -> None:
        """Before the application: what it needs most of its start for. Signals are heard by now."""
        if self.maps_torch:
            map_torch()
        super().load_wsgi()

    def init_signals(self) -> None:
        """Leave Ctrl-C and hang-ups, which reach the whole process group, to the arbiter."""
        super().init_signals()
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """End at once: the second Ctrl-C."""
        os._exit(0)

    def is_parent_alive(self) -> bool:
        """True while the arbiter lives; without it, drain as after SIGTERM."""
        is_alive = bool(super().is_parent_alive())
        if not is_alive:
            self.alive = False
        return is_alive

    def run(self) -> None:
        """Serve until the end, then leave without waiting for threads that will not end.

        A thread that writes to a client which does not read would hold the interpreter's exit,
        and torch may crash in a daemon thread while it is taken apart.
        """
        self.notifier("READY=1\nSTATUS=Serving")
        super().run()
        _leave(0)

    def notify(self) -> None:
        """Tell the arbiter and systemd that all is well; called every second, or more often."""
        super().notify()
        now = time.monotonic()
        if self._ends_at is not None:
            if now >= self._ends_at:
                _leave(FAULTY)
            self.set_accept_enabled(self._accepting)
            return
        fault = self.services.fault() if hasattr(self.services, "fault") else None
        if fault is not None:
            self._end_of(fault)
        elif now >= self._pinged + PING_S:
            self._pinged = now
            self.notifier("WATCHDOG=1")

    def _end_of(self, fault: str) -> None:
        self._ends_at = time.monotonic() + LAST_WORDS_S
        log.critical("%s. What every thread is doing follows", fault)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._drain(0.0)

    def set_accept_enabled(self, enabled: bool) -> None:
        """Accept connections or not. Once the worker ends: refuse them, and begin to drain.

        Where it ends of a fault, those that come last are left to the next one.
        """
        is_over = self._ends_at is not None and time.monotonic() >= self._ends_at - SUCCESSOR_S
        super().set_accept_enabled(enabled and not is_over)
        if not self.alive and not self._draining:
            self._draining = True
            for listener in self.sockets:
                listener.close()  # else the kernel goes on queueing what nobody will answer
            self.notifier("STOPPING=1\nSTATUS=Running answers are finished")
            self._drain(float(self.cfg.graceful_timeout))

    def _drain(self, grace_s: float) -> None:
        try:
            if self.services is not None:
                self.services.drain(grace_s)
        except Exception:
            log.exception("Draining the application failed")

    def finish_request(self, conn: TConn, fs: Any) -> None:
        """After a response, keep its connection open only for a moment once the worker ends."""
        super().finish_request(conn, fs)
        if not self.alive:
            self._cap_keepalive(time.monotonic() + IDLE_LINGER_S)

    def _cap_keepalive(self, deadline: float) -> None:
        deadline = min(deadline, time.monotonic() + IDLE_LINGER_S)
        super()._cap_keepalive(deadline)
        self.cap_waiting(deadline)


def _leave(status: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
