from __future__ import annotations

import http.client
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from tests.servers import WAIT_S, Server, run, serving, started, until
from transformers_api.config.settings import Settings
from transformers_api.server.serve import Deaths, DrainWorker, options

ENDLESS = 10**6
GUNICORN = (sys.executable, "-m", "gunicorn")


def begin(server: Server, ticks: int) -> http.client.HTTPResponse:
    """A stream that has begun."""
    connection = server.connect()
    connection.request("GET", f"/stream?ticks={ticks}")
    response = connection.getresponse()
    assert response.readline() == b"data: tick\n"
    return response


def last_event(response: http.client.HTTPResponse) -> str:
    return response.read().decode().strip().splitlines()[-1]


def deaths_until_the_end(*, apart_s: float = 1.0, reload: bool = False) -> int | None:
    """How many workers may die; None: twenty and more."""
    now = [0.0]
    deaths = Deaths(clock=lambda: now[0])
    arbiter = SimpleNamespace(LISTENERS=["one"], cfg=SimpleNamespace(reload=reload, max_requests=0))
    for count in range(1, 21):
        now[0] += apart_s
        try:
            deaths(cast(Arbiter, arbiter), cast(DrainWorker, None))
        except HaltServer:
            return count
    return None


def test_a_server_whose_workers_die_again_and_again_ends_but_reloads_are_no_deaths() -> None:
    assert deaths_until_the_end() == 5
    assert deaths_until_the_end(apart_s=200) is None
    assert deaths_until_the_end(reload=True) is None


def test_the_options_follow_the_settings() -> None:
    settings = Settings(host="::1", port=8080, max_inflight=8, max_queue=16, graceful_s=7)
    given = options(settings)
    assert given["bind"] == "[::1]:8080"
    assert given["workers"] == 1
    assert given["threads"] == 56  # a thread for each that runs or waits, and some for the rest
    assert given["worker_connections"] > given["threads"]
    assert given["graceful_timeout"] == 7
    assert given["worker_class"] is DrainWorker
    assert given["control_socket_disable"] is True
    assert options(Settings())["bind"] == "127.0.0.1:5000"


def test_sigterm_lets_short_streams_end_tells_long_ones_and_refuses_new_ones() -> None:
    with serving(grace_s=3) as server:
        short, long = begin(server, 20), begin(server, ENDLESS)
        server.signal(signal.SIGTERM)
        until(server.is_refusing)
        assert not short.closed
        assert last_event(short) == "data: [DONE]"
        assert last_event(long) == 'data: {"error": "server_shutting_down"}'
        assert server.wait() == 0
        assert "SIGKILL" not in server.log


def test_the_process_ends_with_its_last_request_and_not_with_the_grace() -> None:
    with serving(grace_s=2 * int(WAIT_S)) as server:
        server.get("/pid")  # its connection is kept open
        stream = begin(server, 10)
        server.signal(signal.SIGTERM)
        assert last_event(stream) == "data: [DONE]"
        assert server.wait() == 0  # within WAIT_S


@pytest.mark.slow
def test_a_connection_that_says_nothing_does_not_hold_the_process() -> None:
    with serving(grace_s=2 * int(WAIT_S)) as server, socket.create_connection(server.address()):
        server.get("/pid")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0  # within WAIT_S


def test_a_thread_that_never_ends_does_not_hold_the_process() -> None:
    with serving(grace_s=1) as server, ThreadPoolExecutor() as pool:
        pid = server.get("/pid")
        server.connect().request("GET", "/stuck")
        until(lambda: server.get("/pid") == pid)
        server.signal(signal.SIGTERM)
        assert pool.submit(server.wait).result(WAIT_S) == 0


def test_the_first_ctrl_c_lets_streams_end() -> None:
    with serving() as server:
        stream = begin(server, 20)
        server.signal(signal.SIGINT)
        assert last_event(stream) == "data: [DONE]"
        assert server.wait() == 0
        assert "Traceback" not in server.log


def test_the_second_ctrl_c_ends_everything_at_once() -> None:
    with serving(grace_s=2 * int(WAIT_S)) as server:
        begin(server, ENDLESS)
        server.signal(signal.SIGINT)
        until(server.is_refusing)
        server.signal(signal.SIGINT)
        assert server.wait() == 0  # within WAIT_S


def test_no_signal_makes_a_second_worker() -> None:
    with serving() as server:
        pid = server.get("/pid")
        for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGUSR2):
            server.process.send_signal(number)
            server.said(f"{number.name} is ignored")
            assert server.get("/pid") == pid
            assert server.log.count("Booting worker") == 1


def test_it_listens_on_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
    with serving(host="::1") as server:
        assert server.address()[0] == "::1"
        assert server.get("/pid").isdigit()


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = run(sys.executable, "app.py", "--port", port)
    assert status == 1
    assert said == f"Cannot listen on HOST=127.0.0.1 PORT={port}: Address already in use\n"


@pytest.mark.parametrize("command", [(sys.executable, "app.py"), (*GUNICORN, "wsgi:app")])
def test_a_bad_setting_is_one_clear_line(command: tuple[str, ...]) -> None:
    status, said = run(*command, PORT="http")
    assert status == 2
    assert said == "PORT='http' is not allowed: expected a whole number from 0 to 65535\n"


def test_a_setting_that_the_application_refuses_is_a_clear_line_too() -> None:
    with serving(app="tests.streaming_app:refuse_to_start") as server:
        assert server.wait() == 2
        assert "MODEL_REGISTRY_PATH=models.json is not allowed: entry 3" in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("command", "environ"),
    [
        ((sys.executable, "app.py", "--workers", "2"), {}),
        ((sys.executable, "app.py", "--port", "0"), {"WEB_CONCURRENCY": "4"}),
        ((*GUNICORN, "--bind", "127.0.0.1:0", "--workers", "2", "app:app"), {}),
    ],
)
def test_more_than_one_worker_is_refused_with_the_reason(
    command: tuple[str, ...], environ: dict[str, str]
) -> None:
    status, said = run(*command, **environ)
    assert status == 2
    assert "would load a copy of the model" in said
    assert "Traceback" not in said


def test_the_documented_gunicorn_command_serves_streams_in_parallel() -> None:
    flags = [
        "--bind",
        "127.0.0.1:0",
        "--workers",
        "1",
        "--worker-class",
        "sync",
        "--timeout",
        "600",
    ]
    with started(*GUNICORN, *flags, "tests.streaming_app:app") as server:
        first, second = begin(server, 20), begin(server, 20)
        assert server.get("/pid").isdigit()
        server.signal(signal.SIGINT)
        assert last_event(first) == last_event(second) == "data: [DONE]"
        assert server.wait() == 0
