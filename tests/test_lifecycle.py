"""How the process ends, by itself and otherwise, and what its surroundings hear of it."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Measured
from tests.repeats import slow
from tests.servers import WAIT_S, Server, serving, started, until
from transformers_api.config.settings import Settings
from transformers_api.server import lock
from transformers_api.server.serve import SECOND_S

REAL = "tests.faulty_app:create_app"
BREAKABLE = "tests.faulty_app:create_breakable_app"
STREAM = {"prompt": "Hi", "stream": True, "max_tokens": 100_000}
STEP_S = 2.0  # an innocent step on a busy machine takes less
SERVE = (sys.executable, "-m", "transformers_api", "serve", "--port", "0")


def post(server: Server, path: str, body: Any) -> http.client.HTTPResponse:
    connection = server.connect()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def begin(server: Server, **fields: Any) -> http.client.HTTPResponse:
    """A stream that has begun."""
    response = post(server, "/v1/completions", STREAM | fields)
    assert response.status == 200, response.read()
    assert response.readline().startswith(b"data: ")
    return response


def last_event(response: http.client.HTTPResponse) -> str:
    return response.read().decode().strip().splitlines()[-1]


def code(event: str) -> str:
    return str(json.loads(event.removeprefix("data: "))["error"]["code"])


def ready(server: Server) -> bool:
    try:
        return '"ready"' in server.get("/readyz")
    except OSError:
        return False


def worker(server: Server) -> int:
    return int(server.said(r"(?s:.*)Booting worker with pid: (\d+)")[1])


def slow_answer(server: Server) -> bytes:
    """The beginning of the answer to a request that takes 0.2 s to send."""
    with socket.create_connection(server.address(), 20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n")
        silence = select.poll()  # select() takes no number above 1,023
        silence.register(connection, select.POLLIN)
        assert silence.poll(200) == []
        connection.sendall(b"Connection: close\r\n\r\n")
        return connection.recv(100)


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    """A socket such as systemd's, and its name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        name = f"\0transformers-api-{os.getpid()}"
        receiver.bind(name)
        receiver.settimeout(WAIT_S)
        yield receiver, "@" + name[1:]


@pytest.mark.slow  # `make faults` runs it; tests/test_server.py has nearly the same
def test_sigterm_refuses_what_is_new_and_says_so_to_what_is_cut_off() -> None:
    with serving(REAL, grace_s=3) as server:
        until(lambda: ready(server))
        short = [begin(server, max_tokens=60) for _ in range(8)]
        long = [begin(server) for _ in range(8)]
        kept = server.connect()
        kept.request("GET", "/healthz")
        kept.getresponse().read()
        server.process.send_signal(signal.SIGTERM)
        until(server.is_refusing)
        kept.request("POST", "/v1/completions", json.dumps({"prompt": "Hi"}))
        refused = kept.getresponse()
        assert refused.status == 503
        assert json.loads(refused.read())["error"]["code"] == "server_shutting_down"
        assert 1 <= int(refused.headers["Retry-After"]) <= 120
        assert {last_event(stream) for stream in short} == {"data: [DONE]"}
        assert {code(last_event(stream)) for stream in long} == {"server_shutting_down"}
        assert server.wait() == 0
        assert "SIGKILL" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGQUIT)])
def test_a_second_signal_ends_everything_at_once(number: signal.Signals) -> None:
    with serving(REAL, grace_s=2 * int(WAIT_S)) as server:
        until(lambda: ready(server))
        begin(server)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)  # the same one, by another way
        until(server.is_refusing)
        if number == signal.SIGTERM:
            until(lambda: time.monotonic() > began + SECOND_S + 0.2)
        assert server.process.poll() is None
        server.process.send_signal(number)
        assert server.wait() == 0  # within WAIT_S


@pytest.mark.parametrize(
    ("how", "reason"),
    [("die", "The engine has stopped"), *slow(("hang", "takes longer than 2 s"))],
)
def test_a_worker_whose_engine_has_stopped_is_replaced(
    how: str, reason: str, measured: Measured
) -> None:
    with serving(BREAKABLE, step_timeout_s=STEP_S) as server:
        until(lambda: ready(server))
        first = worker(server)
        stream = begin(server)
        began = time.monotonic()
        post(server, f"/break/{how}", {}).read()
        until(lambda: not ready(server))
        unready_s = time.monotonic() - began
        while worker(server) == first:
            assert slow_answer(server).startswith(b"HTTP/1.1 ")  # it, or the next one: no reset
        assert code(last_event(stream)) == "server_shutting_down"  # never a normal end
        server.said(rf"Worker \(pid:{first}\) exited with code 70")
        server.said(reason)
        server.said("Thread 0x")  # what every thread was doing
        until(lambda: ready(server))
        assert begin(server)
        measured(f"{how}: not ready after {unready_s:.1f} s, exit 70, replaced, the stream told")
        assert server.process.poll() is None


@pytest.mark.slow
def test_a_killed_worker_is_replaced_at_once_but_not_for_ever() -> None:
    with serving() as server:
        pids = []
        for _ in range(4):
            pids.append(int(server.get("/pid")))
            os.kill(pids[-1], signal.SIGKILL)
            until(lambda: worker(server) not in pids)
            assert server.get("/health")
        os.kill(worker(server), signal.SIGKILL)
        assert server.wait() == 70
        assert "5 workers died within 600 s" in server.log


def test_a_second_server_with_the_same_store_is_refused_by_name(tmp_path: Path) -> None:
    own = {"MODEL_STORE": str(tmp_path), "PRELOAD_MODEL": "false", "RESIDENCY_LOCK": "true"}
    with started(*SERVE, **own) as first:
        first.address()
        with started(*SERVE, **own) as second:
            assert second.wait() == 1
            assert (
                f"Another server (pid {first.process.pid}) serves from MODEL_STORE=" in second.log
            )
            assert "RESIDENCY_LOCK=false" in second.log
            assert "Traceback" not in second.log
        other = lock.take(Settings(model_store=tmp_path, default_device="cuda:1"))
        assert other is not None
        os.close(other)
        os.kill(worker(first), signal.SIGKILL)  # another worker takes its place, with the lock
        first.said(r"(?s)Booting worker.*Booting worker")
        with pytest.raises(lock.LockedByOther):
            lock.take(Settings(model_store=tmp_path))
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 0
    after = lock.take(Settings(model_store=tmp_path))
    assert after is not None
    os.close(after)


def test_the_lock_can_be_turned_off_and_a_store_that_cannot_be_written_needs_none(
    tmp_path: Path,
) -> None:
    first = lock.take(Settings(model_store=tmp_path))
    assert first is not None
    assert lock.take(Settings(model_store=tmp_path, residency_lock=False)) is None
    with pytest.raises(lock.LockedByOther, match=f"pid {os.getpid()}"):
        lock.take(Settings(model_store=tmp_path))
    os.close(first)
    file = tmp_path / "file"
    file.touch()
    assert lock.take(Settings(model_store=file / "store")) is None


def test_systemd_hears_when_the_server_is_ready_alive_and_ending() -> None:
    with listening() as (receiver, name):
        script = "exec {} -c '{}'".format(
            sys.executable,
            "from transformers_api.server.serve import serve; from transformers_api.config.settings import "
            'Settings; serve(Settings(port=0, residency_lock=False), app="tests.streaming_app:'
            'create_app")',
        )
        with started("sh", "-c", script, NOTIFY_SOCKET=name) as server:
            assert receiver.recv(1000).startswith(b"READY=1")
            assert server.get("/pid").isdigit()
            assert receiver.recv(1000) == b"WATCHDOG=1"
            server.process.send_signal(signal.SIGTERM)
            said = receiver.recv(1000)
            while said == b"WATCHDOG=1":
                said = receiver.recv(1000)
            assert said.startswith(b"STOPPING=1")
            assert server.wait() == 0
