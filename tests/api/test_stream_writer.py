"""One thread writes the events of all streams; whatever takes long goes back to the request's."""

import queue
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from transformers_api.api.http import sse
from transformers_api.api.http.stream_writer import StreamWriter

WITHIN_S = 30.0
BIG = b"x" * 200_000  # more than the buffers of a connection hold


@dataclass
class Stream:
    """An answer: what ``say`` is given becomes an event; None ends it, an exception breaks it."""

    quiet_s: float | None = None
    on_end: Callable[[], object] | None = None
    ends: tuple[socket.socket, socket.socket] = field(default_factory=socket.socketpair)

    def __post_init__(self) -> None:
        self.request = SimpleNamespace(quiet_s=self.quiet_s)
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.notice: Callable[[], object] | None = None
        self.ends[1].settimeout(WITHIN_S)

    @property
    def environ(self) -> dict[str, Any]:
        return {"gunicorn.socket": self.ends[0], "SERVER_PROTOCOL": "HTTP/1.1"}

    def notify(self, notice: Callable[[], object]) -> None:
        self.notice = notice

    def say(self, *pieces: Any) -> None:
        for piece in pieces:
            self.said.put(piece)
            if self.notice is not None:
                self.notice()

    def events(self) -> Iterator[bytes]:
        yield b"first"
        while True:
            piece = sse.PING if self.said.empty() else self.said.get()
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def hears(self, wanted: bytes) -> bool:
        """Whether the client is sent just this."""
        got = b""
        while len(got) < len(wanted):
            got += self.ends[1].recv(1 << 16)
        return got == wanted


@pytest.fixture
def writer() -> StreamWriter:
    return StreamWriter()


@pytest.fixture
def make() -> Iterator[Callable[..., Stream]]:
    made: list[Stream] = []

    def stream(**options: Any) -> Stream:
        made.append(Stream(**options))
        return made[-1]

    yield stream
    for each in made:
        for end in each.ends:
            end.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def written(
    writer: StreamWriter, threads: ThreadPoolExecutor, stream: Stream
) -> Future[list[bytes]]:
    """What the thread of a request has of its stream, in the end."""
    body = writer.write(stream.events(), stream, stream.environ)  # type: ignore[arg-type]
    return threads.submit(lambda: list(body))


def chunk(data: bytes) -> bytes:
    return b"%X\r\n%b\r\n" % (len(data), data)


def test_the_first_event_is_the_request_s_and_the_others_are_sent_in_chunks(writer, threads, make):
    stream = make()
    body = written(writer, threads, stream)
    stream.say(b"one", b"twentytwentytwentytwenty")
    assert stream.hears(b"3\r\none\r\n18\r\ntwentytwentytwentytwenty\r\n")
    stream.say(b"last", None)
    assert stream.hears(chunk(b"last"))
    assert body.result(WITHIN_S) == [b"first"]


def test_a_client_that_does_not_read_holds_up_nobody_and_loses_nothing(writer, threads, make):
    slow, quick = make(), make()
    bodies = [written(writer, threads, stream) for stream in (slow, quick)]
    slow.say(BIG, BIG)
    for number in range(3):
        quick.say(b"%d" % number)
        assert quick.hears(chunk(b"%d" % number))
    slow.say(BIG, b"tail", None)
    assert slow.hears(3 * chunk(BIG) + chunk(b"tail"))
    quick.say(None)
    assert [body.result(WITHIN_S) for body in bodies] == [[b"first"], [b"first"]]


def test_what_the_events_raise_is_raised_on_the_thread_of_the_request(writer, threads, make):
    stream, other = make(), make()
    broken, whole = (written(writer, threads, each) for each in (stream, other))
    stream.say(b"one", ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        broken.result(WITHIN_S)
    assert stream.hears(chunk(b"one"))
    other.say(b"still here", None)
    assert other.hears(chunk(b"still here"))
    assert whole.result(WITHIN_S) == [b"first"]


def test_a_client_that_is_gone_is_an_error_of_the_socket(writer, threads, make):
    stream = make()
    body = written(writer, threads, stream)
    stream.ends[1].close()
    stream.say(b"one")
    with pytest.raises(BrokenPipeError):
        body.result(WITHIN_S)


def test_a_silent_stream_gives_signs_of_life(writer, threads, make):
    stream = make(quiet_s=0.01)
    body = written(writer, threads, stream)
    assert stream.hears(2 * chunk(sse.PING))
    stream.say(None)
    assert body.result(WITHIN_S) == [b"first"]


def test_a_dialect_with_another_sign_of_life_is_sent_that_one(writer, threads, make):
    stream, blank = make(quiet_s=0.01), b"\n"
    events = (blank if event is sse.PING else event for event in stream.events())
    body = writer.write(events, stream, stream.environ, blank)
    answer = threads.submit(lambda: list(body))
    assert stream.hears(2 * chunk(blank))
    stream.say(None)
    assert answer.result(WITHIN_S) == [b"first"]


@pytest.mark.parametrize(
    "stays",
    [
        {"SERVER_PROTOCOL": "HTTP/1.0"},
        {"gunicorn.socket": None},
        {"gunicorn.socket": SimpleNamespace()},
    ],
)
def test_what_is_not_sent_in_chunks_to_a_plain_socket_stays_with_its_thread(writer, make, stays):
    stream = make()
    events = stream.events()
    assert writer.write(events, stream, stream.environ | stays) is events


def test_what_has_something_to_settle_at_its_end_stays_with_its_thread(writer, make):
    stream = make(on_end=lambda: None)
    events = stream.events()
    assert writer.write(events, stream, stream.environ) is events
