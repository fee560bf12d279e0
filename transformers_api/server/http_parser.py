"""Whether the bytes that a client has sent are a whole request: no sockets, no threads.

What is in the request, and whether it is right, is gunicorn's to say; here only its end is found,
so that no thread has to wait for it.
"""

from __future__ import annotations

from transformers_api.errors import HeadersTooLarge, InvalidRequest, UriTooLong

MAX_LINE = 4094  # of the request line, in bytes
MAX_HEADS = 100
MAX_HEAD = 8190
MAX_HEAD_BYTES = 32 << 10  # of the request line and all headers together
MAX_CHUNK_LINE = 256
CRLF = b"\r\n"
FRAMING = (b"content-length", b"transfer-encoding")
HEX = b"0123456789abcdefABCDEF"


class Incoming:
    """One request on its way. ``feed`` it until it ``is_complete``, then take ``whole``.

    A body that is longer than ``max_body`` is not waited for: who reads the request refuses it.
    """

    def __init__(self, max_body: int) -> None:
        self.is_complete = False
        self.expects_continue = False  # the client waits for a word before it sends the body
        self._max_body = max_body
        self._data = bytearray()  # what has come; of a body in chunks, what is not in _body yet
        self._head: bytes | None = None  # before the empty line, once that is there
        self._length: int | None = None  # of the body; None: it comes in chunks
        self._body = bytearray()  # put together from chunks
        self._is_too_long = False

    def __len__(self) -> int:
        """Bytes that are kept."""
        return len(self._data) + len(self._body)

    @property
    def path(self) -> str:
        """What the request line names, as far as it has come."""
        line = bytes(self._data[:MAX_LINE]) if self._head is None else self._head
        words = line.split(CRLF, 1)[0].split(b" ")
        return words[1].partition(b"?")[0].decode("latin-1") if len(words) > 1 else ""

    @property
    def whole(self) -> bytes:
        """The request, and what has come after it. A body in chunks has a length instead."""
        if self._head is None:
            return bytes(self._data)
        if self._length is not None:
            return self._head + CRLF + CRLF + bytes(self._data)
        lines = [line for line in self._head.split(CRLF) if _field(line)[0] not in FRAMING]
        length = self._max_body + 1 if self._is_too_long else len(self._body)
        lines.append(b"Content-Length: %d" % length)
        return CRLF.join(lines) + CRLF + CRLF + bytes(self._body + self._data)

    def feed(self, data: bytes) -> None:
        """Take more bytes. Raises UriTooLong, HeadersTooLarge, InvalidRequest."""
        begun = len(self._data)
        self._data += data
        if self._head is None:
            self._find_head(max(begun - 3, 0))
        if self._head is None or self.is_complete:
            return
        if self._length is None:
            self._join_chunks()
        else:
            self.is_complete = len(self._data) >= self._length or self._length > self._max_body

    def _find_head(self, start: int) -> None:
        end = self._data.find(CRLF + CRLF, start)
        if 0 <= end <= MAX_HEAD_BYTES:
            self._head = bytes(self._data[:end])
            del self._data[: end + 4]
            self._read_head(self._head)
            return
        line = self._data.find(CRLF, 0, MAX_LINE + 2)
        if line < 0 and len(self._data) > MAX_LINE + 2:
            raise UriTooLong(f"The request line has more than {MAX_LINE} bytes")
        if end >= 0 or len(self._data) > MAX_HEAD_BYTES:
            raise HeadersTooLarge(f"The headers have more than {MAX_HEAD_BYTES} bytes")

    def _read_head(self, head: bytes) -> None:
        line, *lines = head.split(CRLF)
        headers = [_field(line) for line in lines]
        match [pair for pair in headers if pair[0] in FRAMING]:
            case [(b"content-length", length)] if length.isdigit() and len(length) < 19:
                self._length = int(length)
            case [(b"transfer-encoding", coding)] if coding.lower() == b"chunked" and line.endswith(
                b"HTTP/1.1"
            ):
                self._length = None
            case _:  # without a body, or gunicorn will refuse it whatever follows
                self._length = 0
        self.expects_continue = (b"expect", b"100-continue") in headers

    def _join_chunks(self) -> None:
        at = 0
        while (found := self._chunk(at)) is not None:
            size, start = found
            if size == 0:
                if self._end_chunks(start):
                    return
                break
            self._is_too_long = len(self._body) + size > self._max_body
            end = start + size
            if self._is_too_long or end + 2 > len(self._data):
                self.is_complete = self._is_too_long
                break
            if self._data[end : end + 2] != CRLF:
                raise InvalidRequest("The body is not in chunks: one has not the size that it says")
            self._body += self._data[start:end]
            at = end + 2
        del self._data[:at]

    def _chunk(self, at: int) -> tuple[int, int] | None:
        """(size, where it begins) of the chunk whose line begins at ``at``."""
        end = self._data.find(CRLF, at, at + MAX_CHUNK_LINE)
        if end < 0 and len(self._data) - at < MAX_CHUNK_LINE:
            return None
        digits = bytes(self._data[at : max(end, at)]).partition(b";")[0].rstrip()
        if not digits or digits.strip(HEX):
            raise InvalidRequest("The body is not in chunks: a size is not a number")
        return int(digits, 16), end + 2

    def _end_chunks(self, start: int) -> bool:
        """After the last one, which is empty: nobody reads the trailer, up to an empty line."""
        end = self._data.find(CRLF + CRLF, start - 2)
        if end < 0 and len(self._data) - start > MAX_HEAD:
            raise HeadersTooLarge(f"The trailer has more than {MAX_HEAD} bytes")
        if end >= 0:
            self.is_complete = True
            del self._data[: end + 4]
        return self.is_complete


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.strip().lower(), value.strip()
