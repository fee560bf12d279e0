"""Buckets in a real redis: the same numbers, shared, and local ones while redis is away."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import redis

from tests.redis_server import RedisServer
from tests.servers import ROOT
from transformers_api.serving.limits.redis_rate_limit import (
    PREFIX,
    TIMEOUT_S,
    TRY_AGAIN_S,
    Redis,
    SharedRateLimiter,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="module")
def started(folder):
    server = RedisServer(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(started):
    if started._process is None:
        started.start()
    client = redis.Redis.from_url(started.url)
    client.flushall()
    client.close()
    return started


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(server, clock):
    store = Redis(server.url, clock=clock)
    yield store
    store.close()


def taken(limiter, client="c", cost=1):
    return limiter.take(client, cost).wait_s == 0


def test_a_burst_is_allowed_and_the_rest_is_told_when_to_come(store):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert [limiter.take("c").remaining for _ in range(3)] == [2, 1, 0]
    refused = limiter.take("c")
    assert refused.wait_s == pytest.approx(6, abs=0.5)
    assert refused.full_in_s == pytest.approx(18, abs=0.5)
    assert taken(limiter, "other")


def test_kinds_have_buckets_of_their_own_and_no_limit_asks_nobody(server, store):
    for kind in ("requests", "tokens"):
        assert taken(SharedRateLimiter(store, kind, 1, 1))
    assert [taken(SharedRateLimiter(store, "none", 0, 1)) for _ in range(5)] == [True] * 5
    client = redis.Redis.from_url(server.url)
    assert sorted(client.keys()) == [f"{PREFIX}:{k}:c".encode() for k in ("requests", "tokens")]
    client.close()


def test_full_buckets_leave_redis_by_themselves(server, store):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    limiter.take("c")
    client = redis.Redis.from_url(server.url)
    assert 5000 < client.pttl(f"{PREFIX}:requests:c") <= 6001
    limiter.give_back("c", 1)
    assert client.keys() == []
    client.close()


def test_costs_and_what_comes_back(store):
    limiter = SharedRateLimiter(store, "tokens", 600, 600)
    assert limiter.take("c", 500).remaining == pytest.approx(100, abs=5)
    assert not taken(limiter, cost=300)
    limiter.give_back("c", 450)
    assert limiter.take("c", 500).remaining == pytest.approx(50, abs=9)
    assert limiter.take("c", 601).wait_s == math.inf


def test_sixty_four_at_once_get_the_burst_and_no_more(server):
    stores = [Redis(server.url) for _ in range(4)]
    limiters = [SharedRateLimiter(store, "requests", 10, 3) for store in stores]
    start, allowed = threading.Barrier(64), []

    def ask(limiter):
        start.wait(10)
        allowed.append(taken(limiter))

    threads = [threading.Thread(target=ask, args=(limiters[i % 4],)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for store in stores:
        store.close()
    assert (len(allowed), sum(allowed)) == (64, 3)


ASK = """
import sys
from transformers_api.serving.limits.redis_rate_limit import Redis, SharedRateLimiter
limiter = SharedRateLimiter(Redis(sys.argv[1]), "requests", 1, 10)
sys.stdin.read()
print(sum(limiter.take("c").wait_s == 0 for _ in range(10)))
"""


def test_processes_share_what_they_allow(server):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, server.url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    allowed = [int(process.communicate(timeout=20)[0]) for process in processes]
    assert sum(allowed) == 10


def test_a_redis_that_dies_leaves_local_limits_and_one_line(server, store, clock, caplog):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert taken(limiter)
    server.kill()
    with caplog.at_level(logging.INFO):
        assert [taken(limiter) for _ in range(6)] == [True] * 3 + [False] * 3
        limiter.give_back("c", 1)
        clock.now += TRY_AGAIN_S + 1  # it is tried again, and is still away
        assert [taken(limiter) for _ in range(2)] == [True, False]
        (record,) = caplog.records
        assert "REDIS_URL does not answer, rate limits are local" in record.getMessage()
        server.start()
        clock.now += TRY_AGAIN_S / 2
        assert not taken(limiter)  # nobody asks redis yet
        clock.now += TRY_AGAIN_S
        assert [taken(limiter) for _ in range(4)] == [True] * 3 + [False]
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "REDIS_URL answers again, rate limits are shared"
    ]


def test_a_redis_that_was_restarted_between_two_requests_is_no_failure(server, store, caplog):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert taken(limiter)
    server.kill()
    server.start()
    assert limiter.take("c").remaining == 2
    assert caplog.records == []


def test_a_redis_that_hangs_holds_up_one_request_and_not_for_long(server, store, clock):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert taken(limiter)
    server.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert taken(limiter)
        first_s = time.monotonic() - began
        assert [taken(limiter) for _ in range(20)] == [True] * 2 + [False] * 18
        all_s = time.monotonic() - began
    finally:
        server.signal(signal.SIGCONT)
    assert first_s < TIMEOUT_S + 0.2
    assert all_s - first_s < 0.2


def test_a_start_without_redis_has_local_limits(tmp_path):
    store = Redis(f"unix://{tmp_path}/nobody.sock")
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert [taken(limiter) for _ in range(4)] == [True] * 3 + [False]
    store.close()


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_a_clock_of_redis_that_is_set_locks_nobody_out(server, store, jump_s):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    client = redis.Redis.from_url(server.url)
    client.set(f"{PREFIX}:requests:c", time.time() - jump_s)
    client.close()
    level = limiter.take("c")
    assert level.wait_s <= 6
    assert level.full_in_s <= 18


def test_what_stands_in_the_key_of_a_bucket_and_is_no_bucket_is_no_error(server, store):
    client = redis.Redis.from_url(server.url)
    client.rpush(f"{PREFIX}:requests:c", "x")
    client.close()
    assert taken(SharedRateLimiter(store, "requests", 10, 3))
