"""Clients that read a large answer slowly, or not at all, hold no thread."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import transformers_api
from tests.served_app import serving
from tests.servers import WAIT_S, Server

ASSET = "/docs/assets/redoc/redoc.standalone.js"
FILE = Path(transformers_api.__file__).parent / "api" / "ops" / "static" / "redoc"
CONTENT = (FILE / "redoc.standalone.js").read_bytes()
SEND_S = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Few slots and no queue, so that there are less threads than slow readers."""
    limits = {"MAX_INFLIGHT": "2", "MAX_QUEUE": "0", "SEND_TIMEOUT_S": str(SEND_S)}
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, PRELOAD_MODEL="false", **limits) as one:
        one.get("/openapi.json")  # is described when it is first asked for
        yield one


def asked(server: Server, path: str, end: str = "\r\n\r\n", buffer: int = 2048) -> socket.socket:
    """A client that has asked, with the buffers of a network: the loopback's take megabytes."""
    client = socket.socket()
    client.settimeout(WAIT_S)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
    client.connect(server.address())
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: h{end}".encode())
    return client


def body_of(client: socket.socket) -> bytes:
    """The body of the next answer, by its length."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += client.recv(1 << 16)
    head, _, body = raw.partition(b"\r\n\r\n")
    (length,) = (
        int(line[15:]) for line in head.split(b"\r\n") if line[:15].lower() == b"content-length:"
    )
    while len(body) < length:
        piece = client.recv(1 << 16)
        assert piece, f"{len(body)} of {length} bytes"
        body += piece
    return body


@pytest.mark.slow  # `make faults` runs it
def test_who_reads_nothing_is_ended(server) -> None:
    with asked(server, ASSET) as client:
        server.said("read nothing for 8 s|read too slowly")
        with suppress(ConnectionResetError):
            assert len(client.recv(len(CONTENT), socket.MSG_WAITALL)) < len(CONTENT)


@pytest.mark.parametrize("path", [ASSET, "/openapi.json"])
def test_as_many_slow_readers_as_like_leave_the_threads_to_others(server, path) -> None:
    began = time.monotonic()
    with ExitStack() as clients:
        slow = [clients.enter_context(asked(server, path)) for _ in range(60)]
        for client in slow:
            assert client.recv(16).startswith(b"HTTP/1.1 200")
        assert '"object"' in server.get("/v1/models")
        assert time.monotonic() - began < SEND_S / 2  # else some were given up meanwhile


def test_what_is_read_slowly_is_whole_and_the_connection_serves_on(server) -> None:
    with asked(server, ASSET) as client:
        assert body_of(client) == CONTENT
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert body_of(client) == b'{"status":"ok"}'


def test_requests_behind_a_large_answer_are_answered_after_it(server) -> None:
    request = f"GET {ASSET} HTTP/1.1\r\nHost: h\r\n\r\n"
    last = "GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    with asked(server, ASSET, "\r\n\r\n" + request + last) as client:
        raw = b""
        while piece := client.recv(1 << 16):
            raw += piece
    assert raw.count(CONTENT) == 2
    assert raw.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize(
    "field", ["Range: bytes=100-200099", "If-None-Match: x"], ids=["a range", "a condition"]
)
def test_a_part_is_sent_as_it_was_asked_for(server, field) -> None:
    with asked(server, ASSET, f"\r\n{field}\r\n\r\n") as client:
        body = body_of(client)
    assert body == (CONTENT[100:200_100] if "Range" in field else CONTENT)


def test_a_head_has_no_body(server) -> None:
    with asked(server, ASSET) as client:
        assert body_of(client) == CONTENT
        client.sendall(f"HEAD {ASSET} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        raw = b""
        while piece := client.recv(1 << 16):
            raw += piece
    assert raw.endswith(b"\r\n\r\n")


def test_answers_that_nobody_reads_hold_no_thread_however_short(server) -> None:
    requests = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n" * 400
    with ExitStack() as clients:
        for _ in range(5):  # there are four threads for such requests
            client = clients.enter_context(asked(server, "/healthz"))
            client.sendall(requests)
        end = time.monotonic() + 1  # those whose thread is held are not given up yet
        while time.monotonic() < end:
            began = time.monotonic()
            assert server.get("/healthz") == '{"status":"ok"}'
            assert time.monotonic() - began < SEND_S / 2
