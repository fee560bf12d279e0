"""A real server with a real engine that is ended, killed, or whose clock jumps, in the middle."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.busy_machine import allowed
from tests.conftest import Measured
from tests.faults.tiny import Stream, environment, started, until
from tests.servers import serving
from tests.test_lifecycle import begin, code, last_event, post, ready

pytestmark = pytest.mark.timeout(300)

CLOCK = "tests.faults.clock_app:create_app"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("tiny"))


def last(stream: Stream) -> Any:
    return list(stream.events())[-1]


@pytest.mark.slow
def test_sigterm_lets_the_short_half_of_sixteen_streams_end_and_tells_the_other(
    settings: dict[str, str], measured: Measured
) -> None:
    grace_s = 8
    with started(settings, GRACEFUL_S=str(grace_s), MAX_INFLIGHT="32") as tiny:
        streams = [tiny.begin(max_tokens=(300, 30_000)[n % 2]) for n in range(16)]
        began = time.monotonic()
        tiny.server.process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor(16) as pool:
            ends = list(pool.map(last, streams))
        status = tiny.server.wait()
        took_s = time.monotonic() - began
        log = tiny.server.log
    told = [end["error"]["code"] for end in ends[1::2]]
    measured(
        f"{ends[::2].count('[DONE]')} of 8 short streams whole, "
        f"{told.count('server_shutting_down')} of 8 long ones told; exit {status} after "
        f"{took_s:.1f} s of {grace_s} s"
    )
    assert ends[::2] == ["[DONE]"] * 8
    assert told == ["server_shutting_down"] * 8
    assert status == 0
    assert took_s < grace_s + allowed(1)
    assert "SIGKILL" not in log


@pytest.mark.slow
def test_after_sigkill_in_the_middle_of_streams_a_new_worker_serves(
    settings: dict[str, str], measured: Measured
) -> None:
    with started(settings) as tiny:
        streams = [tiny.begin() for _ in range(4)]
        began = time.monotonic()
        os.kill(tiny.worker, signal.SIGKILL)
        ends = [cut_off(stream) for stream in streams]
        health_s = until(lambda: answers(lambda: tiny.ask("GET", "/health")), 60)
        until(
            lambda: answers(
                lambda: tiny.ask("POST", "/v1/completions", {"max_tokens": 1, "prompt": "Hi"})
            )
        )
        token_s = time.monotonic() - began
        load_s = tiny.status()["resident"]["load_s"]
    measured(
        f"/health after {health_s:.1f} s, a token after {token_s:.1f} s (loading the model takes "
        f"{load_s:.1f} s of it); no stream looked complete"
    )
    assert "[DONE]" not in ends
    assert token_s < load_s + allowed(30)


def cut_off(stream: Stream) -> Any:
    """What came last on a connection that ended by itself."""
    try:
        return last(stream)
    except (OSError, IndexError):
        return None


def answers(ask: Any) -> bool:
    try:
        return bool(ask()[0] == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing() -> None:
    with serving(
        CLOCK, grace_s=3, request_timeout_s=60, rate_limit_per_min=600, rate_limit_burst=9
    ) as server:
        until(lambda: ready(server))
        stream = begin(server)
        for hours in (1, -2, 25):
            told = post(server, f"/clock/{hours * 3600}", {})
            assert told.status == 200, told.read()
            lines = [stream.readline() for _ in range(20)]
            assert sum(line.startswith(b"data: ") for line in lines) >= 9
            answer = post(server, "/v1/completions", {"prompt": "Hi", "max_tokens": 3})
            assert answer.status == 200, answer.read()
            assert ready(server)
        server.process.send_signal(signal.SIGTERM)
        assert code(last_event(stream)) == "server_shutting_down"
        assert server.wait() == 0
