"""Notice at once that a client has left: before the first byte, while streaming, while queued.

A write fails only on the second try after the client closed, and a request that writes nothing
would never learn of it. One thread waits on the sockets of all running requests instead.

A client may also say that it sends no more, and still read: to the server both look the same. What
is written tells them apart, as only a client that is gone answers with a reset. In a stream that is
a comment, written at once and every second from then on; before an answer it is ``100 Continue``,
which every client of HTTP/1.1 skips. One of HTTP/1.0 need not know it: there the half stands for
the whole.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from transformers_api.logs import carried

log = logging.getLogger(__name__)

PING_S = 1.0  # between two comments to a client that sends no more
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
HAS_EPOLL = hasattr(select, "epoll")  # Linux; elsewhere a failed write is all that tells


class Socket(Protocol):
    """The part of ``environ["gunicorn.socket"]`` that is used here."""

    def fileno(self) -> int:
        """The file descriptor."""
        ...


class Watch:
    """One watched request. ``close`` it when the request has ended; also a context manager."""

    def __init__(self, unwatch: Callable[[], None], client: _Client | None = None) -> None:
        self._lock = threading.Lock()
        self._unwatch: Callable[[], None] | None = unwatch
        self._client = client

    def answers_with(self, ping: Callable[[], None]) -> None:
        """Let ``ping``, from any thread, have something written to a client in doubt.

        It is quick and is called once the answer has begun.
        """
        if self._client is not None:
            self._client.ping = ping

    def answer_begins(self) -> None:
        """Write nothing to the client from here on: the answer will, and is watched further."""
        if self._client is not None:
            with self._client.lock:  # no probe is on its way
                self._client.has_answer = True

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

    def __init__(
        self, fd: int, on_gone: Callable[[], None], may_be_probed: bool, lock: threading.Lock
    ) -> None:
        self.on_gone = on_gone
        self.may_be_probed = may_be_probed
        self.lock = lock  # the watcher's
        self.has_answer = False  # it is being written
        self.ping: Callable[[], None] = lambda: None
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
            self.ping()
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
        self._in_doubt: set[_Client] = set()  # they send no more; guarded by the lock

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
        may_be_probed = environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
        client = _Client(fd, carried(on_gone), may_be_probed, self._lock)
        with self._lock:
            try:
                epoll = self._started()
                epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
            except BaseException:
                client.close()
                raise
            self._clients[fd] = client  # looked for under the lock
        return Watch(lambda: self._unwatch(epoll, fd, client), client)

    def _started(self) -> Any:
        if self._pid != os.getpid():  # a fork inherits no thread
            epoll = select.epoll()
            thread = threading.Thread(
                target=self._run, args=(epoll,), name="disconnect-watcher", daemon=True
            )
            thread.start()
            self._pid, self._epoll, self._clients, self._in_doubt = os.getpid(), epoll, {}, set()
        return self._epoll

    def _unwatch(self, epoll: Any, fd: int, client: _Client) -> None:
        with self._lock:
            self._clients.pop(fd, None)
            self._in_doubt.discard(client)
            epoll.unregister(fd)
            client.close()

    def _run(self, epoll: Any) -> None:
        ping_at = 0.0  # time.monotonic()
        while True:
            events = epoll.poll(PING_S if self._in_doubt else None)
            if time.monotonic() >= ping_at:
                ping_at = time.monotonic() + PING_S
                self._ping()
            for fd, _ in events:
                on_gone = self._take(fd)
                if on_gone is None:
                    continue
                try:
                    on_gone()
                except Exception:
                    log.exception("Cancelling the request of a client that left failed")

    def _ping(self) -> None:
        with self._lock:
            for client in self._in_doubt:
                if client.has_answer:
                    client.ping()

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
                self._in_doubt.add(client)
                self._epoll.modify(fd, select.EPOLLONESHOT)  # hang-ups and errors from here on
            if not has_left:
                return None
            self._in_doubt.discard(client)
            return self._clients.pop(fd).on_gone
