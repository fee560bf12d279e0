"""A client that says that it sends no more, and reads: as `nc` does."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.served_app import serving
from tests.servers import WAIT_S, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), PRELOAD_MODEL="false") as one:
        yield one


def answered(server: Server, *, stream: bool) -> bytes:
    """All that comes after the half of the connection was closed."""
    body = json.dumps({"prompt": "hi", "max_tokens": 3, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.address(), WAIT_S) as client:
        client.sendall(head.encode() + body)
        client.shutdown(socket.SHUT_WR)
        raw = b""
        while piece := client.recv(1 << 16):
            raw += piece
    return raw


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_closes_its_half_after_the_request_is_answered(server, stream) -> None:
    interim, final = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"
    raw = answered(server, stream=stream)
    assert raw.removeprefix(interim).startswith(final)
    assert raw.count(b"HTTP/1.1") == 1 + raw.startswith(interim)
    assert raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}}}")


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("silent"), "tests.served_app:create_silent_app") as one:
        yield one


def in_silence(server: Server, protocol: str) -> socket.socket:
    """A client that has the first event of a stream which goes on in silence."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions {protocol}\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
    client = socket.create_connection(server.address(), WAIT_S)
    client.sendall(head.encode() + body)
    raw = b""
    while b"data: {" not in raw:
        raw += client.recv(1 << 16)
    return client


def active(server: Server) -> int:
    return int(json.loads(server.get("/health"))["active_requests"])


# With and without the writer of streams; KEEPALIVE_S is a quarter of a minute.
@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.0"])
def test_a_client_that_leaves_a_silent_stream_is_noticed_at_once(silent, protocol) -> None:
    client = in_silence(silent, protocol)
    assert active(silent) == 1
    began = time.monotonic()
    client.close()
    while active(silent):
        assert time.monotonic() < began + 12.0
    assert time.monotonic() < began + 12.0


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.0"])
def test_a_client_that_closes_its_half_of_a_silent_stream_reads_on(silent, protocol) -> None:
    with in_silence(silent, protocol) as client:
        client.shutdown(socket.SHUT_WR)
        assert b": ping" in client.recv(1 << 16)
        assert active(silent) == 1
    while active(silent):
        pass
