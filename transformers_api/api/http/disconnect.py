"""Notice at once that a client has left: before the first byte, while streaming, while queued.

A write fails only on the second try after the client closed, and a request that writes nothing
would never learn of it. One thread waits on the sockets of all running requests instead.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from transformers_api.logs import carried

log = logging.getLogger(__name__)

HAS_EPOLL = hasattr(select, "epoll")  # Linux; elsewhere a failed write is all that tells


class Socket(Protocol):
    """The part of ``environ["gunicorn.socket"]`` that is used here."""

    def fileno(self) -> int:
        """The file descriptor."""
        ...


class Watch:
    """One watched request. ``close`` it when the request has ended; also a context manager."""

    def __init__(self, unwatch: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._unwatch: Callable[[], None] | None = unwatch

    def close(self) -> None:
        """Stop watching. Idempotent. A callback that has begun may still be running."""
        with self._lock:
            unwatch, self._unwatch = self._unwatch, None
        if unwatch is not None:
            unwatch()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DisconnectWatcher:
    """Calls back when the client of a request has closed its connection, or half of it.

    Its thread starts with the first watch, in the process that asks for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._epoll: Any = None
        self._callbacks: dict[int, Callable[[], None]] = {}

    def watch(self, environ: Mapping[str, Any], on_gone: Callable[[], None]) -> Watch:
        """Call ``on_gone`` at most once, on the watcher's thread, when the client has left.

        Does nothing for a request without a socket (a test client) and where there is no epoll.
        """
        sock: Socket | None = environ.get("gunicorn.socket")
        if sock is None or not HAS_EPOLL:
            return Watch(lambda: None)
        # A copy of the descriptor: the number of the original may belong to somebody else by the
        # time that its event is read.
        fd = os.dup(sock.fileno())
        with self._lock:
            try:
                epoll = self._started()
                epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
            except BaseException:
                os.close(fd)
                raise
            self._callbacks[fd] = carried(on_gone)  # looked for under the lock
        return Watch(lambda: self._unwatch(epoll, fd))

    def _started(self) -> Any:
        if self._pid != os.getpid():  # a fork inherits no thread
            epoll = select.epoll()
            thread = threading.Thread(
                target=self._run, args=(epoll,), name="disconnect-watcher", daemon=True
            )
            thread.start()
            self._pid, self._epoll, self._callbacks = os.getpid(), epoll, {}
        return self._epoll

    def _unwatch(self, epoll: Any, fd: int) -> None:
        with self._lock:
            self._callbacks.pop(fd, None)
            epoll.unregister(fd)
            os.close(fd)

    def _run(self, epoll: Any) -> None:
        while True:
            for fd, _ in epoll.poll():
                callback = self._take(fd)
                if callback is None:
                    continue
                try:
                    callback()
                except Exception:
                    log.exception("Cancelling the request of a client that left failed")

    def _take(self, fd: int) -> Callable[[], None] | None:
        """The callback of ``fd``, if its connection really is closed.

        Between the event and now the watch may have ended, and the number may have gone to
        another one.
        """
        with self._lock:
            if fd not in self._callbacks or not _is_closed(fd):
                return None
            return self._callbacks.pop(fd)


def _is_closed(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)  # hang-ups and errors are always reported
    return bool(poll.poll(0))
