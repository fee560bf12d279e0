"""Bodies of answers that a client does not take at once: the main loop sends the rest.

A thread that waited for a slow reader would be held as long as that one likes. So a thread sends
what the socket's buffer takes and goes on; what is left leaves whenever the client has read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator

from transformers_api.logs import carried

FIRST_BYTES = (
    4096  # leave with the headers: the buffer of a socket that is writable has room for it
)
TURN_BYTES = 1 << 16  # of one answer in one turn of the main loop
LEAST_RATE = 16 << 10  # bytes per second that a client has to take


class LargeBody:
    """The body of one answer. Iterated by a thread; what is left then, the main loop sends.

    ``length``: the bytes that the answer's head promises; no more are sent.
    """

    def __init__(self, body: Iterable[bytes], sock: socket.socket, length: int) -> None:
        self.left = length
        self.is_left = False  # to the main loop: the thread has gone on
        self._pieces = iter(body)
        self._socket = sock
        self._unsent = memoryview(b"")  # of the piece that is being sent
        self._close: Callable[[], object] | None = carried(getattr(body, "close", lambda: None))
        self._has_begun = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """The first bytes, which go out with the head; then nothing: the rest is sent here."""
        if not self._has_begun:
            self._has_begun = True
            if self._fill():
                first = bytes(self._unsent[: min(FIRST_BYTES, self.left)])
                self._advance(len(first))
                return first
        self.is_left = not self.send(self.left)
        raise StopIteration

    def send(self, most: int = TURN_BYTES) -> bool:
        """Send at most so many bytes, as far as the client takes them; True once all are sent.

        Raises OSError where the client has left, and what the body raises.
        """
        while most > 0 and self._fill():
            try:
                sent = self._socket.send(self._unsent[: min(most, self.left)], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            self._advance(sent)
            most -= sent
        return not self._fill()

    def _fill(self) -> bool:
        """True where there are bytes to send."""
        while self.left > 0 and not self._unsent:
            piece = next(self._pieces, None)
            if piece is None:
                self.left = 0
            else:
                self._unsent = memoryview(piece)
        return self.left > 0

    def _advance(self, count: int) -> None:
        self._unsent = self._unsent[count:]
        self.left -= count

    def close(self) -> None:
        """The thread is done with the answer: it is over, unless the main loop sends the rest."""
        if not self.is_left:
            self.end()

    def end(self) -> None:
        """The answer is over. Idempotent."""
        close, self._close = self._close, None
        if close is not None:
            close()


class UnsentBody:
    """A connection whose answer the main loop sends, as its client reads it."""

    def __init__(self, body: LargeBody, keep: bool, until: float) -> None:
        self.body = body
        self.keep = keep  # the connection, for another request
        self.until = until  # time.monotonic(), for the next bytes
        self.end = until + body.left / LEAST_RATE  # for the last one
