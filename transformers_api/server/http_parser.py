"""The framing of requests: bytes of a client to whole requests, without sockets or threads.

No thread waits for a client, so the end of a request has to be found before one takes it. Only
this reader decides how long a request is: a head that it does not understand is refused, and what
it passes on to gunicorn has at most a ``Content-Length`` and is complete, so that gunicorn, which
reads it once more, never waits for bytes. RFC 9112, sections 2 to 7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from transformers_api.errors import HeadersTooLarge, InvalidRequest, UriTooLong

MAX_LINE = 4094  # of the request line, in bytes
MAX_HEADS = 100
MAX_HEAD = 8190
MAX_HEAD_BYTES = 32 << 10  # of the request line and all headers together
MAX_CHUNK_LINE = 256
LEAST_CHUNKS = 4096  # that every body may have, and
MEAN_CHUNK = 256  # bytes of the mean chunk of a longer one: reading a chunk costs as much as 1 KB
CRLF = b"\r\n"
FRAMING = (b"content-length", b"transfer-encoding")
HOST = re.compile(rb"[0-9A-Za-z\-._~!$&'()*+,;=%:\[\]]*")  # a name or an address, and a port
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
LENGTH = re.compile(rb"0*([0-9]{1,18})")
NOT_A_HEAD = re.compile(rb"(?<!\r)\n|\r[^\n]|[\x00-\x08\x0b\x0c\x0e-\x1f]")  # nor its beginning
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;[^\r]*)?\r\n")


class RequestHead:
    """The request line and the headers, as far as they have come; for refusals."""

    def __init__(self, data: bytes) -> None:
        self._line, *self._fields = data.split(CRLF)

    @property
    def method(self) -> str:
        """Method of the request line."""
        return self._line.partition(b" ")[0].decode("latin-1")

    @property
    def path(self) -> str:
        """Path of the request line."""
        words = self._line.split(b" ")
        return words[1].partition(b"?")[0].decode("latin-1") if len(words) > 1 else ""

    def field(self, name: bytes) -> str:
        """The first value of a header, by its name in lower case; "" without it."""
        for text in self._fields:
            match = FIELD.fullmatch(text)
            if match and match[1].lower() == name:
                return match[2].strip(b" \t").decode("latin-1")
        return ""


@dataclass(frozen=True, slots=True)
class Uploads:
    """Paths below which what is put may be longer, by the bytes that it may have, and for whom."""

    most: Mapping[str, int] = field(default_factory=dict)
    allows: Callable[[RequestHead], bool] = lambda _: True

    def limit(self, head: RequestHead) -> int | None:
        """Bytes that the body may have; None: as many as any other."""
        for start, most in self.most.items():
            if head.method == "PUT" and head.path.startswith(start) and self.allows(head):
                return most
        return None


NO_UPLOADS = Uploads()


class RequestBuffer:
    """One request on its way. ``feed`` it until it ``is_complete``, then take ``whole``.

    A body that is longer than ``max_body`` bytes is not waited for: the application refuses it by
    the length that it is told.
    """

    def __init__(self, max_body: int, uploads: Uploads = NO_UPLOADS) -> None:
        self.is_complete = False
        self.is_upload = False  # with a body longer than others may have
        self.expects_continue = False  # the client waits for a word before it sends the body
        self._limit(max_body)
        self._uploads = uploads
        self._data = bytearray()  # unread bytes; of a body in chunks, those not in _body yet
        self._head: bytes | None = None  # before the empty line, once that is there
        self._length: int | None = None  # of the body; None: it comes in chunks
        self._body = bytearray()  # put together from chunks
        self._chunks = 0
        self._is_too_long = False

    def _limit(self, max_body: int) -> None:
        self._max_body = max_body
        self._max_chunks = max(LEAST_CHUNKS, max_body // MEAN_CHUNK)

    def __len__(self) -> int:
        """Bytes that are held."""
        return len(self._data) + len(self._body)

    @property
    def most(self) -> int:
        """Bytes that the body may come to have."""
        return self._max_body if self._length is None else self._length

    @property
    def head(self) -> RequestHead:
        """The request line as far as it has come, and the headers that are whole."""
        if self._head is not None:
            return RequestHead(self._head)
        data = bytes(self._data[:MAX_HEAD_BYTES])
        end = data.rfind(CRLF)
        return RequestHead(data if end < 0 else data[:end])

    @property
    def whole(self) -> bytes:
        """The request, and what has come after it. A body in chunks has a length instead."""
        if self._head is None:
            return bytes(self._data)
        if self._length is not None:
            return b"".join([self._head, CRLF, CRLF, self._data])
        line, *fields = self._head.split(CRLF)
        others = [field for field in fields if field.partition(b":")[0].lower() not in FRAMING]
        length = self._max_body + 1 if self._is_too_long else len(self._body)
        head = CRLF.join([line, *others, b"Content-Length: %d" % length])
        return head + CRLF + CRLF + bytes(self._body + self._data)

    def feed(self, data: bytes) -> None:
        """Take more bytes. Raises UriTooLong, HeadersTooLarge, InvalidRequest."""
        start = len(self._data)
        self._data += data
        if self._head is None:
            self._find_head(max(start - 3, 0))
        if self._head is None or self.is_complete:
            return
        if self._length is None:
            self._join_chunks()
        else:
            self.is_complete = len(self._data) >= self._length or self._length > self._max_body

    def _find_head(self, start: int) -> None:
        if self._data.startswith(CRLF):  # one empty line before a request is not part of it
            del self._data[:2]
            start = 0
        end = self._data.find(CRLF + CRLF, start)
        if 0 <= end <= MAX_HEAD_BYTES:
            self._head = bytes(self._data[:end])
            del self._data[: end + 4]
            self._read_head(self._head)
            return
        if end < 0 and (match := NOT_A_HEAD.search(self._data, start)):
            raise InvalidRequest(
                f"The request is not HTTP: {_excerpt(match[0])} in its head, whose lines end with "
                f"{_excerpt(CRLF)}"
            )
        line = self._data.find(CRLF, 0, MAX_LINE + 2)
        if line < 0 and len(self._data) > MAX_LINE + 2:
            raise UriTooLong(f"The request line has more than {MAX_LINE} bytes")
        if end >= 0 or len(self._data) > MAX_HEAD_BYTES:
            raise HeadersTooLarge(f"The headers have more than {MAX_HEAD_BYTES} bytes")

    def _read_head(self, head: bytes) -> None:
        line, *lines = head.split(CRLF)
        if len(lines) > MAX_HEADS or any(len(text) + 2 > MAX_HEAD for text in lines):
            raise HeadersTooLarge(
                f"More than {MAX_HEADS} headers, or one of more than {MAX_HEAD} bytes"
            )
        fields = [_field(text) for text in lines]
        _check_host(line, [value for name, value in fields if name == b"host"])
        self._length = _body_length(line, [pair for pair in fields if pair[0] in FRAMING])
        if self._length is None or self._length > self._max_body:
            most = self._uploads.limit(RequestHead(head))
            if most is not None:
                self._limit(most)
                self.is_upload = True
        expectations = [value.lower() for name, value in fields if name == b"expect"]
        self.expects_continue = b"100-continue" in expectations and line.endswith(b"HTTP/1.1")

    def _join_chunks(self) -> None:
        at = 0
        while (line := self._chunk_line(at)) is not None:
            size, start = line
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
            self._count_chunk()
            self._body += self._data[start:end]
            at = end + 2
        del self._data[:at]

    def _chunk_line(self, at: int) -> tuple[int, int] | None:
        """(size, offset of the data) of the chunk whose line begins at ``at``, if it is whole."""
        line = CHUNK_LINE.match(self._data, at, at + MAX_CHUNK_LINE)
        if line is not None:
            return int(line[1], 16), line.end()
        end = self._data.find(CRLF, at, at + MAX_CHUNK_LINE)
        if end < 0 and len(self._data) - at < MAX_CHUNK_LINE:
            return None
        raise InvalidRequest("The body is not in chunks: a size is not a number")

    def _count_chunk(self) -> None:
        self._chunks += 1
        if self._chunks > self._max_chunks:
            raise InvalidRequest(f"The body comes in more than {self._max_chunks} chunks")

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
    """(name in lower case, value) of a header line."""
    field = FIELD.fullmatch(line)
    if field is None:
        raise InvalidRequest(f"The request is not HTTP: a header reads {_excerpt(line)}")
    return field[1].lower(), field[2].rstrip(b" \t")


def _check_host(line: bytes, hosts: list[bytes]) -> None:
    """Raise InvalidRequest unless one header says whom it is to; HTTP/1.0 need not have it."""
    if len(hosts) > 1 or (not hosts and line.endswith(b"HTTP/1.1")):
        raise InvalidRequest("The request is not HTTP: Host has to come once")
    if hosts and not HOST.fullmatch(hosts[0]):
        raise InvalidRequest(f"The request is not HTTP: Host is {_excerpt(hosts[0])}")


def _body_length(line: bytes, framing: list[tuple[bytes, bytes]]) -> int | None:
    """Bytes of the body by its framing headers; None where it comes in chunks."""
    match framing:
        case []:
            return 0
        case [(b"content-length", value)] if value.isdigit():
            length = LENGTH.fullmatch(value)
            return int(length[1]) if length else 1 << 62  # too long for anybody
        case [(b"transfer-encoding", coding)] if coding.lower() == b"chunked":
            if line.endswith(b"HTTP/1.1"):
                return None
            raise InvalidRequest("The request is not HTTP: only HTTP/1.1 has bodies in chunks")
        case [(b"content-length", value)]:
            raise InvalidRequest(f"The request is not HTTP: Content-Length is {_excerpt(value)}")
        case [(b"transfer-encoding", coding)]:
            raise InvalidRequest(
                f"Transfer-Encoding is {_excerpt(coding)}: only chunked is known here"
            )
        case _:
            raise InvalidRequest(
                "The request is not HTTP: Content-Length and Transfer-Encoding may come once, "
                "and not together"
            )


def _excerpt(text: bytes) -> str:
    return repr(text[:80].decode("latin-1"))
