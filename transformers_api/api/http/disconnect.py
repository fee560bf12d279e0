"""Notice at once that a client has left: before the first byte, while streaming, while queued.

A write fails only on the second try after the client closed, and a request that writes nothing
would never learn of it. One thread waits on the sockets of all running requests instead.

A client may also say that it sends no more, and still read: to the server both look the same. What
is written tells them apart, as only a client that is gone answers with a reset. In a stream that is
the next event; before an answer it is ``100 Continue``, which every client of HTTP/1.1 skips. One
of HTTP/1.0 need not know it: there the half stands for the whole.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from transformers_api.logs import carried

log = logging.getLogger(__name__)

PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
HAS_EPOLL = hasattr(select, "epoll")  # Linux; elsewhere a failed write is all that tells


class Socket(Protocol):
    """The part of ``environ["gunicorn.socket"]`` that is used here."""

    def fileno(self) -> int:
        """The file descriptor."""
        ...


class Watch:
    """One watched request. ``close`` it when the request has ended; also a context manager."""

    def __init__(
        self, unwatch: Callable[[], None], on_answer: Callable[[], None] = lambda: None
    ) -> None:
        self._lock = threading.Lock()
        self._unwatch: Callable[[], None] | None = unwatch
        self._on_answer = on_answer

    def answer_begins(self) -> None:
        """Write nothing to the client from here on: the answer will, and is watched further."""
        self._on_answer()

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


class _Client:
    """The connection of one watched request, by a descriptor of its own."""

    def __init__(self, fd: int, on_gone: Callable[[], None], may_be_probed: bool) -> None:
        self.on_gone = on_gone
        self.may_be_probed = may_be_probed
        self.has_answer = False  # it is being written
        self._socket = socket.socket(fileno=fd)

    def has_left(self) -> bool | None:
        """None: it sends no more, but there is no sign that it does not read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)  # hang-ups and errors are always reported
        events = poll.poll(0)
        if not events:
            return False
        if events[0][1] & (select.POLLHUP | select.POLLERR):
            return True
        if self.has_answer:
            return None
        if not self.may_be_probed:
            return True
        try:
            self._socket.send(PROBE, socket.MSG_DONTWAIT)
        except BlockingIOError:  # it has not read what came before: that will tell as well
            return None
        except OSError:
            return True
        return None

    def close(self) -> None:
        """Close the descriptor, not the connection."""
        self._socket.close()


class DisconnectWatcher:
    """Calls back when the client of a request has closed its connection.

    Its thread starts with the first watch, in the process that asks for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._epoll: Any = None
        self._clients: dict[int, _Client] = {}  # by their descriptors

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
        client = _Client(fd, carried(on_gone), environ.get("SERVER_PROTOCOL") == "HTTP/1.1")
        with self._lock:
            try:
                epoll = self._started()
                epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
            except BaseException:
                client.close()
                raise
            self._clients[fd] = client  # looked for under the lock
        return Watch(lambda: self._unwatch(epoll, fd, client), lambda: self._begin(client))

    def _begin(self, client: _Client) -> None:
        with self._lock:  # no probe is on its way
            client.has_answer = True

    def _started(self) -> Any:
        if self._pid != os.getpid():  # a fork inherits no thread
            epoll = select.epoll()
            thread = threading.Thread(
                target=self._run, args=(epoll,), name="disconnect-watcher", daemon=True
            )
            thread.start()
            self._pid, self._epoll, self._clients = os.getpid(), epoll, {}
        return self._epoll

    def _unwatch(self, epoll: Any, fd: int, client: _Client) -> None:
        with self._lock:
            self._clients.pop(fd, None)
            epoll.unregister(fd)
            client.close()

    def _run(self, epoll: Any) -> None:
        while True:
            for fd, _ in epoll.poll():
                on_gone = self._take(fd)
                if on_gone is None:
                    continue
                try:
                    on_gone()
                except Exception:
                    log.exception("Cancelling the request of a client that left failed")

    def _take(self, fd: int) -> Callable[[], None] | None:
        """The callback of ``fd``, if its client really has left.

        Between the event and now the watch may have ended, and the number may have gone to
        another one.
        """
        with self._lock:
            client = self._clients.get(fd)
            if client is None:
                return None
            has_left = client.has_left()
            if has_left is None:
                self._epoll.modify(fd, select.EPOLLONESHOT)  # hang-ups and errors from here on
            if not has_left:
                return None
            return self._clients.pop(fd).on_gone
