"""Clients without rights who would take the server down: a real server and model."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.api.test_body_limits import SHAPES, SMALL
from tests.busy_machine import allowed
from tests.conftest import Measured
from tests.faults.tiny import LIMIT_S, MODEL, Tiny, environment, started

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

BODIES = 2000
SLOW = 200  # clients; the server has 96 threads
POST = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
SLOW_WAYS = {
    "a head that does not end": "GET /v1/models HTTP/1.1\r\nHost: ",
    "a body that does not come": f"{POST}Content-Length: 50\r\n\r\n",
    "chunks that do not come": f"{POST}Transfer-Encoding: chunked\r\n\r\n",
    "a coding and chunks": f"{POST}Transfer-Encoding: gzip, chunked\r\n\r\n",
    "no coding and chunks": f"{POST}Transfer-Encoding: identity, chunked\r\n\r\n",
    "codings in two lines": f"{POST}Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunks in capitals": f"{POST}Transfer-Encoding: CHUNKED\r\n\r\n",
    "a length twice": f"{POST}Content-Length: 50\r\nContent-Length: 50\r\n\r\n",
    "a word before the body": f"{POST}Expect: 100-continue\r\nContent-Length: 50\r\n\r\n",
    "another protocol": f"{POST}Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 9\r\n\r\n",
    "an answer that is not read": "GET /docs/assets/redoc/redoc.standalone.js HTTP/1.1\r\n"
    "Host: localhost\r\n\r\n",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    settings = environment(tmp_path_factory.mktemp("tiny"))
    with started(settings, MAX_INFLIGHT="32", MAX_QUEUE="32") as one:
        yield one


@pytest.mark.timeout(900)
def test_two_thousand_refused_bodies_of_every_shape_leave_no_memory(
    tiny: Tiny, measured: Measured
) -> None:
    bodies = [*SHAPES.values(), *SMALL.values()]

    def send(number: int) -> None:
        path = ("/v1/chat/completions", "/v1/completions", "/generate", "/inspect/tokens")
        status, _ = tiny.ask("POST", path[number % 4], bodies[number % len(bodies)])
        assert status in (400, 413, 422)

    for number in range(200):
        send(number)
    before, most = tiny.rss_mb(), 0.0
    for number in range(BODIES):
        send(number)
        most = max(most, tiny.rss_mb())
    after = tiny.rss_mb()
    measured(
        f"{BODIES} bodies of {len(bodies)} shapes: {before:.0f} MB before, at most {most:.0f}, "
        f"{after:.0f} after"
    )
    assert after < before + 20
    assert most < before + 100


def chat_s(tiny: Tiny) -> float:
    began = time.monotonic()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert tiny.ask("POST", "/v1/chat/completions", body)[0] == 200
    return time.monotonic() - began


def health_s(tiny: Tiny) -> float:
    began = time.monotonic()
    assert tiny.ask("GET", "/health")[0] == 200
    return time.monotonic() - began


def connected(tiny: Tiny) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(LIMIT_S)
    client.connect(tiny.address)
    return client


def test_two_hundred_slow_clients_keep_nobody_waiting(tiny: Tiny, measured: Measured) -> None:
    waits = {}
    for name, head in SLOW_WAYS.items():
        with ExitStack() as clients:
            for _ in range(SLOW):
                clients.enter_context(connected(tiny)).sendall(head.encode())
            waits[name] = max(chat_s(tiny) for _ in range(5)), max(health_s(tiny) for _ in range(5))
    chat, health = (max(pair[i] for pair in waits.values()) for i in (0, 1))
    measured(
        f"{len(waits)} ways: a chat in at most {chat * 1e3:.0f} ms, /health {health * 1e3:.0f}"
    )
    assert chat < allowed(2.0), waits
    assert health < allowed(1.0), waits


@contextmanager
def sending(tiny: Tiny, head: str, piece: bytes) -> Iterator[list[int]]:
    """A client that sends one piece after the other, anew whenever it is refused; the counts."""
    is_over, pieces, requests = threading.Event(), [0], [0]

    def send() -> None:
        while not is_over.is_set():
            with connected(tiny) as client:
                requests[0] += 1
                try:
                    client.sendall(head.encode())
                    while not is_over.is_set():
                        client.sendall(piece)
                        pieces[0] += 1
                except OSError:
                    continue

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield requests
    finally:
        is_over.set()
        sender.join(LIMIT_S)


@pytest.mark.parametrize(
    "piece",
    [b"1\r\n \r\n" * 10_000, b"1\r\n \r\n", b"01;x=y\r\n \r\n" * 1000, b"2\r\n{}\r\n" * 3000],
)
def test_small_chunks_do_not_hold_up_the_main_loop(tiny: Tiny, measured: Measured, piece) -> None:
    with sending(tiny, f"{POST}Transfer-Encoding: chunked\r\n\r\n", piece) as requests:
        end, waits = time.monotonic() + 4, []
        while time.monotonic() < end:
            waits.append(health_s(tiny))
    middle, longest = statistics.median(waits), max(waits)
    measured(
        f"{len(piece)} bytes at a time, {requests[0]} requests in 4 s: /health after "
        f"{middle * 1e3:.0f} ms, at most {longest * 1e3:.0f}"
    )
    assert middle < allowed(0.2)
    assert longest < allowed(1.0)
