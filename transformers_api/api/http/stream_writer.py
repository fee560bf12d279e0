"""One thread that writes the tokens of all streams to their clients.

A step of the engine gives every stream a token. If each stream's own thread woke for it, all of
them would take the interpreter's lock and a core from the next step by turns, and most of that time
would go into the turns. One thread does the same for all of them in a row, while the step runs.

It waits for nobody. What a client does not take at once, an answer's end and whatever goes wrong
are handed back to the request's own thread, which sleeps meanwhile.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from transformers_api.api.http import sse
from transformers_api.logs import carried
from transformers_api.serving.generation import Generation

CAN_SEND_AT_ONCE = hasattr(socket, "MSG_DONTWAIT")  # not on Windows


class StreamWriter:
    """Its thread starts with the first stream, in the process that asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._ready: queue.SimpleQueue[StreamBody] = queue.SimpleQueue()

    def write(
        self,
        frames: Iterator[bytes],
        generation: Generation,
        environ: Mapping[str, Any],
        ping: bytes = sse.PING,
    ) -> Iterator[bytes]:
        """``frames``, the events of ``generation``, as the body of an answer in chunks.

        ``ping`` is the very object that ``frames`` give where nothing is ready.

        Those of a generation that has to settle something at its end, which may take long, and
        of an answer that is not sent in chunks to a plain socket stay with their request's thread.
        """
        sock = environ.get("gunicorn.socket")
        if (
            generation.on_end is not None
            or type(sock) is not socket.socket
            or environ.get("SERVER_PROTOCOL") != "HTTP/1.1"
            or not CAN_SEND_AT_ONCE
        ):
            return frames
        return StreamBody(frames, generation, sock, self._started(), ping)

    def _started(self) -> queue.SimpleQueue[StreamBody]:
        with self._lock:
            if self._pid != os.getpid():  # a fork inherits no thread
                ready: queue.SimpleQueue[StreamBody] = queue.SimpleQueue()
                thread = threading.Thread(
                    target=self._run, args=(ready,), name="stream-writer", daemon=True
                )
                thread.start()
                self._pid, self._ready = os.getpid(), ready
            return self._ready

    def _run(self, ready: queue.SimpleQueue[StreamBody]) -> None:
        while True:
            ready.get().send_ready()


class StreamBody:
    """The body of one answer. Iterated by the thread of its request, which gets the first event.

    The others are sent by the writer, while ``__next__`` waits for the end.
    """

    def __init__(
        self,
        frames: Iterator[bytes],
        generation: Generation,
        sock: socket.socket,
        ready: queue.SimpleQueue[StreamBody],
        ping: bytes,
    ) -> None:
        self._frames = frames
        self._generation = generation
        self._quiet_s = generation.request.quiet_s
        self._socket = sock
        self._ready = ready
        self._ping_frame = ping
        self._has_begun = False
        self._is_ping_due = False  # whatever has been sent
        self._is_lent = False  # to the writer; else it is with the thread of the request
        self._sent_at = 0.0  # time.monotonic()
        self._returned: queue.SimpleQueue[tuple[bytes, BaseException | None]] = queue.SimpleQueue()
        self._collect = carried(self._collect_frames)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """The first event, which goes out with the headers; then nothing, at the end.

        Raises what the events or the socket raise.
        """
        if not self._has_begun:
            self._has_begun = True
            return next(self._frames)
        self._generation.notify(self._announce)
        while True:
            unsent, end = self._lend()
            if unsent:
                self._socket.sendall(unsent)
            if end is not None:
                raise end

    def close(self) -> None:
        """The answer is over; called by the thread of the request."""
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()

    def ping(self) -> None:
        """Have something written at once, at the latest when the client takes more. Any thread."""
        self._is_ping_due = True
        self._announce()

    def _announce(self) -> None:
        self._ready.put(self)

    def _lend(self) -> tuple[bytes, BaseException | None]:
        """Lend it to the writer until it comes back; remind that of clients that hear nothing."""
        self._sent_at = reminded_at = time.monotonic()
        self._is_lent = True
        self._announce()
        while True:
            wait_s = None
            if self._quiet_s is not None:
                due = max(self._sent_at, reminded_at) + self._quiet_s
                wait_s = max(due - time.monotonic(), 0.0)
            try:
                return self._returned.get(timeout=wait_s)
            except queue.Empty:
                reminded_at = time.monotonic()
                self._announce()

    # -- the writer's thread --------------------------------------------------------------------

    def send_ready(self) -> None:
        """Send the events that are ready."""
        if not self._is_lent:  # it was called for before it came back
            return
        data, end = self._collect()
        unsent = b""
        if data:
            self._sent_at = time.monotonic()
            try:
                unsent = data[self._socket.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                unsent = data
            except OSError as error:
                end = error
        if unsent or end is not None:
            self._is_lent = False
            self._returned.put((unsent, end))

    def _collect_frames(self) -> tuple[bytes, BaseException | None]:
        """The events that are ready, as chunks; and how it ends, if it does."""
        is_ping_due, self._is_ping_due = self._is_ping_due, False  # one that comes now is another
        chunks: list[bytes] = []
        end: BaseException | None = None
        try:
            while (frame := next(self._frames)) is not self._ping_frame:
                chunks.append(_chunk(frame))
        except BaseException as error:  # StopIteration too
            end = error
        if not chunks and end is None and (is_ping_due or self._has_been_quiet()):
            chunks.append(_chunk(self._ping_frame))
        return b"".join(chunks), end

    def _has_been_quiet(self) -> bool:
        return self._quiet_s is not None and time.monotonic() >= self._sent_at + self._quiet_s


def _chunk(frame: bytes) -> bytes:
    return b"%X\r\n%b\r\n" % (len(frame), frame)
