"""A restart under systemd's socket activation: nobody is refused and nothing is lost."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.deploy.activation import activated, unit, until
from tests.deploy.nginx import Proxy, needs_nginx
from tests.servers import WAIT_S

# Short, so that many are just beginning when the end comes: those get 503, and are asked again.
ASK = {"model": "paced", "prompt": "Hello", "max_tokens": 1}


@pytest.fixture
def service(tmp_path):
    with unit(tmp_path) as one:
        yield one


def status(connection: http.client.HTTPConnection) -> int:
    response = connection.getresponse()
    response.read()
    return response.status


def asked(port: int, method: str, path: str, body: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return status(connection)
    finally:
        connection.close()


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd is not installed")
def test_who_comes_before_systemd_has_started_the_server_is_answered_by_it(tmp_path) -> None:
    with activated(tmp_path) as (port, process, log), ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(asked, port, "GET", "/healthz") for _ in range(8)]
        assert [call.result() for call in calls] == [200] * 8, log.read_text()
        assert asked(port, "POST", "/v1/completions", json.dumps(ASK)) == 200
        process.terminate()
        assert process.wait(WAIT_S) == 0, log.read_text()


def test_the_socket_that_is_handed_over_is_the_one_that_is_served(service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_S)
    connection.request("GET", "/healthz")
    assert status(connection) == 200
    connection.close()
    assert "Cannot listen" not in service.log
    assert service.stop() == 0


@pytest.mark.slow
def test_who_connects_while_no_process_is_there_is_answered_by_the_next(service) -> None:
    assert service.stop() == 0
    waiting = [
        http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_S) for _ in range(50)
    ]
    for connection in waiting:
        connection.request("GET", "/healthz")
    service.start()
    assert Counter(map(status, waiting)) == {200: 50}
    for connection in waiting:
        connection.close()


def test_the_socket_stays_open_while_running_answers_end(service) -> None:
    with ThreadPoolExecutor() as pool:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_S)
        connection.request("GET", "/healthz")
        assert status(connection) == 200
        stopped = pool.submit(service.stop)
        for _ in range(20):
            socket.create_connection(("127.0.0.1", service.port), WAIT_S).close()
        assert stopped.result(WAIT_S) == 0
        connection.close()


@needs_nginx
def test_restarts_under_load_lose_no_request(service, tmp_path_factory, measured) -> None:
    with Proxy(tmp_path_factory.mktemp("nginx"), service.port).running() as proxy:
        is_over = threading.Event()
        answers: list[tuple[int, float, str]] = []

        def client() -> None:
            while not is_over.is_set():
                began = time.monotonic()
                answer = proxy.ask("POST", "/v1/completions", ASK)
                answers.append((answer.status, time.monotonic() - began, answer.text))

        with ThreadPoolExecutor(24) as pool:
            clients = [pool.submit(client) for _ in range(24)]
            downs = []
            try:
                for _ in range(3):
                    enough = len(answers) + 100
                    until(lambda enough=enough: len(answers) > enough)
                    began = time.monotonic()
                    service.restart()
                    downs.append(time.monotonic() - began)
            finally:
                is_over.set()
            for one in clients:
                one.result(WAIT_S)
    slowest = max(seconds for _, seconds, _ in answers)
    measured(
        f"{len(downs)} restarts of at most {max(downs):.1f} s, {len(answers)} requests by 24 "
        f"clients, all answered, the slowest after {slowest:.1f} s"
    )
    assert Counter(code for code, _, _ in answers) == {200: len(answers)}, answers
    assert slowest < max(downs) + 5
