"""A client that says that it sends no more, and reads: as `nc` does."""

from __future__ import annotations

import json
import socket
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
