"""Refusals below the application have the headers of all other answers; over real sockets."""

from __future__ import annotations

import http.client
import re
import socket
from collections.abc import Iterator
from http.client import HTTPMessage

import pytest

from tests.served_app import serving
from tests.servers import WAIT_S, Server

PAGE = "https://page.example"
MINE = f"Host: h\r\nX-Request-Id: mine-1\r\nOrigin: {PAGE}\r\n"
REFUSED = {
    "no HTTP": (f"GET /v1/models HTTP/9.9\r\n{MINE}\r\n", 400),
    "two lengths": (
        f"POST /v1/models HTTP/1.1\r\n{MINE}Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        400,
    ),
    "too late": (f"POST /v1/models HTTP/1.1\r\n{MINE}Content-Length: 3\r\n\r\na", 408),
    "many headers": (f"GET /v1/models HTTP/1.1\r\n{MINE}" + "X: y\r\n" * 120 + "\r\n", 431),
    "a long header": (f"GET /v1/models HTTP/1.1\r\n{MINE}X: {'y' * 40_000}", 431),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    settings = {"CORS_ALLOW_ORIGINS": PAGE, "RECEIVE_TIMEOUT_S": "1", "PRELOAD_MODEL": "false"}
    with serving(folder, **settings) as one:
        yield one


def answer(server: Server, request: str) -> tuple[int, HTTPMessage]:
    with socket.create_connection(server.address(), WAIT_S) as client:
        client.sendall(request.encode())
        response = http.client.HTTPResponse(client)
        response.begin()
        response.read()
        return response.status, response.headers


@pytest.mark.parametrize("refusal", REFUSED)
def test_a_refusal_has_the_headers_that_the_application_gives(server, refusal) -> None:
    request, status = REFUSED[refusal]
    refused_status, refused = answer(server, request)
    _, of_application = answer(server, f"GET /v1/nothing HTTP/1.1\r\n{MINE}\r\n")
    assert refused_status == status
    missing = {name.lower() for name in of_application} - {name.lower() for name in refused}
    assert missing <= {"server", "date"}, refused.as_string()
    assert refused["X-Request-Id"] == "mine-1"
    assert int(refused["OpenAI-Processing-Ms"]) >= (900 if status == 408 else 0)
    for name in ("Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Vary"):
        assert refused[name] == of_application[name]


@pytest.mark.parametrize("line", ["", 'X-Request-Id: a"b\r\n', "X-Request-Id: a\tb\r\n"])
def test_an_id_that_is_no_good_is_replaced(server, line) -> None:
    _, refused = answer(server, f"GET / HTTP/1.1\r\nHost: h\r\n{line}Content-Length: x\r\n\r\n")
    assert re.fullmatch("[0-9a-f]{32}", refused["X-Request-Id"])


def test_another_page_may_not_read_a_refusal(server) -> None:
    _, refused = answer(
        server, "GET / HTTP/1.1\r\nHost: h\r\nOrigin: https://x\r\nContent-Length: x\r\n\r\n"
    )
    assert "Access-Control-Allow-Origin" not in refused
    assert refused["Vary"] == "Origin"
