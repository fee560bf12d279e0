"""Clients that send slowly, badly or too much, and clients that do not read: over real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import psutil
import pytest

from tests.servers import WAIT_S, Server, serving

HALF_LINE = b"GET /pi"
HALF_HEADERS = b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Len"
HALF_BODY = b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nab"
HALF_CHUNK = b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"
CODINGS = HALF_CHUNK.replace(b"chunked", b"identity, chunked")
BYTES = HALF_CHUNK[:-7] + b"1\r\n \r\n" * 20_000  # a body in chunks of a byte
POST_OF = b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
GET = b"GET /pid HTTP/1.1\r\nHost: h\r\n\r\n"


class Answer:
    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = dict(line.lower().split(": ", 1) for line in lines)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with four slots: 36 threads and those for probes."""
    with serving(max_queue=0, receive_timeout_s=1.0, send_timeout_s=1.0) as started:
        started.get("/health")  # its worker is there too
        yield started


@pytest.fixture(scope="module")
def patient() -> Iterator[Server]:
    """The same with so much patience that who waits behind half a request waits too long."""
    with serving(max_queue=0, receive_timeout_s=3 * WAIT_S) as started:
        started.get("/health")
        yield started


@contextmanager
def connected(
    server: Server, sent: bytes = b"", buffer: int | None = None
) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.settimeout(WAIT_S)
        if buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.connect(server.address())
        client.sendall(sent)
        yield client


def until_closed(client: socket.socket) -> bytes:
    raw = b""
    while piece := client.recv(1 << 16):
        raw += piece
    return raw


def answer(server: Server, request: bytes) -> Answer:
    """The answer to a request after which the server closes the connection."""
    with connected(server, request) as client:
        return Answer(until_closed(client))


def took_s(server: Server, path: str = "/health") -> float:
    began = time.monotonic()
    server.get(path)
    return time.monotonic() - began


def effort_s(server: Server, path: str = "/health") -> float:
    """The processor's seconds that the server takes until it has answered, on a busy machine, too.

    An answer for which it sleeps instead does not come within WAIT_S.
    """
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children()
    times = [process.cpu_times() for process in processes]
    server.get(path)
    return sum(
        now.user + now.system - before.user - before.system
        for before, now in zip(times, [process.cpu_times() for process in processes], strict=True)
    )


@pytest.mark.parametrize(
    "half",
    [b"", HALF_LINE, HALF_HEADERS, HALF_BODY, HALF_CHUNK, CODINGS, BYTES],
    ids=["nothing", "line", "headers", "body", "chunk", "codings", "bytes"],
)
def test_many_clients_that_send_half_a_request_keep_nobody_waiting(
    patient: Server, half: bytes
) -> None:
    with ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(connected(patient, half))
        assert effort_s(patient) < (5 if half is BYTES else 1)  # two million chunks, read once
        assert effort_s(patient, "/pid") < 1


def test_half_a_request_is_given_up_with_a_reason(server: Server) -> None:
    found = answer(server, HALF_BODY)
    assert found.status == 408
    assert json.loads(found.body) == {"detail": "The request was not complete after 1 s"}


def test_half_a_request_behind_a_whole_one_takes_no_thread(patient: Server) -> None:
    with ExitStack() as clients:
        opened = [clients.enter_context(connected(patient, GET + HALF_BODY)) for _ in range(60)]
        for client in opened:
            assert b"200 OK" in client.recv(1 << 16)
        assert effort_s(patient, "/pid") < 1


def test_a_request_may_come_byte_by_byte(server: Server) -> None:
    with connected(server) as client:
        for byte in HALF_BODY:
            client.sendall(bytes([byte]))
        client.sendall(b"c" * 98)
        answer = b""
        while not answer.endswith(b"ab" + b"c" * 98):  # head and body may come apart
            part = client.recv(1 << 16)
            assert part, answer
            answer += part


def test_requests_may_come_in_one_piece(server: Server) -> None:
    whole = b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n"
    last = b"POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
    with connected(server, whole + b"one" + whole + b"two" + last + b"end") as client:
        raw = until_closed(client)
    assert [part[:3] for part in raw.split(b"\r\n\r\n")[1:]] == [b"one", b"two", b"end"]


def test_a_client_that_waits_for_a_word_gets_it_once(server: Server) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with connected(server, head + b"Content-Length: 3\r\n\r\n") as client:
        assert client.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        raw = until_closed(client)
    assert b"100 Continue" not in raw
    assert raw.endswith(b"abc")


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"HELLO\r\n\r\n", 400, None),
        (b"GET / HTTP/1.1\nHost: h\n\n", 400, None),
        (b"GET / HTTP/1.0\r\r", 400, None),
        (b"GET /v1/models\r\nHost: h\n", 400, None),
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(160), 400, None),  # TLS
        (b"GET /pid HTTP/1.1\r\n\r\n", 400, None),
        (b"GET / HTTP/9.9\r\n\r\n", 400, None),
        (b"GET /v1/models HTTP/1.1\r\nHost : h\r\n\r\n", 400, None),
        (b"GET /v1/models HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", 400, None),
        (
            b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
            400,
            None,
        ),
        (b"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 400, None),
        (b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, None),
        (b"GET /v1/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414, "uri_too_long"),
        (b"GET /v1 HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431, "headers_too_large"),
        (b"GET /v1 HTTP/1.1\r\nA: " + b"b" * 9000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /v1 HTTP/1.1\r\nA: " + b"b" * 90000, 431, "headers_too_large"),
    ],
)
def test_what_is_not_http_is_refused_in_json(
    server: Server, request_: bytes, status: int, code: str | None
) -> None:
    found = answer(server, request_)
    assert found.status == status
    assert found.headers["content-type"] == "application/json"
    error = json.loads(found.body)
    error = error.get("error", error)
    assert error.get("message") or error["detail"]
    assert error.get("code") == code


def test_a_client_that_stays_after_an_error_does_not_hold_the_others(server: Server) -> None:
    """The lingering close is nobody's to wait for."""
    with ExitStack() as clients:
        opened = [clients.enter_context(connected(server, b"HELLO\r\n\r\n")) for _ in range(20)]
        for client in opened:
            assert b"400" in client.recv(1 << 16)
        assert took_s(server) < 1


def test_a_client_that_never_reads_is_given_up_and_its_thread_is_free(server: Server) -> None:
    flood = b"GET /flood HTTP/1.1\r\nHost: h\r\n\r\n"
    with ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(connected(server, flood, buffer=4096))
        assert took_s(server) < 1
        reader = clients.enter_context(
            connected(server, b"GET /stream?ticks=50 HTTP/1.1\r\nHost: h\r\n\r\n")
        )
        ends = [server.get("/flooded") for _ in range(20)]
        assert ends == ["True"] * 20
        raw = reader.recv(1 << 20)
        while b"[DONE]" not in raw:
            raw += reader.recv(1 << 20)
        assert raw.count(b"data: tick") == 50


def test_the_server_says_whether_it_lives_while_every_thread_is_taken(server: Server) -> None:
    with ExitStack() as clients:
        for _ in range(60):
            request = b"GET /stream?ticks=1000 HTTP/1.1\r\nHost: h\r\n\r\n"
            clients.enter_context(connected(server, request))
        times = sorted(took_s(server) for _ in range(20))
        assert times[-3] < 1  # a busy machine may leave it without a core for longer


def test_whoever_is_dropped_to_make_room_takes_nobody_along() -> None:
    """Bytes of one that was dropped may have been seen already, in the same look at all."""
    body = POST_OF % (1 << 20) + bytes(60_000)
    with serving("tests.streaming_app:create_cramped_app", max_queue=0) as server:
        pid = server.get("/pid")
        for _ in range(2):
            with ExitStack() as clients:
                opened = [clients.enter_context(connected(server)) for _ in range(30)]
                with ThreadPoolExecutor(30) as pool, suppress(OSError):
                    list(pool.map(lambda client: client.sendall(body), opened))
        assert server.get("/pid") == pid


def test_few_files_are_on_their_way_at_once_and_none_without_a_key() -> None:
    head = b"PUT /inspect/lenses/x HTTP/1.1\r\nHost: h\r\nX-API-Key: %b\r\nContent-Length: 9999999\r\n\r\n"
    with serving("tests.streaming_app:create_cramped_app", max_queue=0) as server:
        server.get("/health")
        with ExitStack() as clients:
            refused = clients.enter_context(connected(server, head % b"wrong"))
            assert b" 404 " in refused.recv(1 << 16)  # answered by the application, without a body
            first = [clients.enter_context(connected(server, head % b"right")) for _ in range(2)]
            server.get("/health")
            third = clients.enter_context(connected(server, head % b"right"))
            said = third.recv(1 << 16)
            assert b" 429 " in said
            assert b"Other large files are on their way already" in said
            first[0].close()
            server.get("/health")
            again = clients.enter_context(connected(server, head % b"right"))
            again.settimeout(0.2)
            with pytest.raises(TimeoutError):
                again.recv(1)


def test_when_connections_run_out_the_one_that_waited_longest_goes(patient: Server) -> None:
    with ExitStack() as clients:
        opened = [clients.enter_context(connected(patient, HALF_LINE)) for _ in range(1010)]
        assert effort_s(patient) < 2
        assert until_closed(opened[0]) == b""
        opened[-1].sendall(b"d HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"200 OK" in opened[-1].recv(1 << 16)
