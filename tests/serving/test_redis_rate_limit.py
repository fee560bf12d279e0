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
from limits.storage import storage_from_string
from limits.strategies import STRATEGIES

from tests.redis_server import RedisServer, wait_for_redis
from tests.servers import ROOT
from transformers_api.serving.limits.redis_buckets import PREFIX, storage_of
from transformers_api.serving.limits.token_bucket import NAME, Rate
from transformers_api.serving.redis_times import TRY_AGAIN_S


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
def server(started, monkeypatch):
    wait_for_redis(monkeypatch)
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


def made(url, clock=time.monotonic):
    """The strategy as flask-limiter makes it, over a redis."""
    uri, options = storage_of(url)
    strategy = STRATEGIES[NAME](storage_from_string(uri, **options))
    strategy.clock = clock
    return strategy


@pytest.fixture
def store(server, clock):
    strategy = made(server.url, clock)
    yield strategy
    strategy.storage.get_connection().close()


class SharedRateLimiter:
    """Clients of one rate."""

    def __init__(self, store, kind, per_min, burst):
        self.store, self.kind, self.rate = store, kind, Rate(burst, per_min)

    def take(self, client, cost=1):
        return self.store.take(self.rate, client, self.kind, cost=cost)

    def give_back(self, client, cost):
        self.store.give_back(self.rate, client, self.kind, cost=cost)


def key(kind, burst, per_min):
    """Where redis has the bucket of the client "c"."""
    return f"{PREFIX}:LIMITER/c/{kind}/{burst}/{per_min}/bucket"


def taken(limiter, client="c", cost=1):
    return limiter.take(client, cost).wait_s == 0


def test_a_burst_is_allowed_and_the_rest_is_told_when_to_come(store):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert [limiter.take("c").remaining for _ in range(3)] == [2, 1, 0]
    refused = limiter.take("c")
    assert refused.wait_s == pytest.approx(6, abs=0.5)
    assert refused.full_in_s == pytest.approx(18, abs=0.5)
    assert taken(limiter, "other")


def test_kinds_have_buckets_of_their_own(server, store):
    for kind in ("requests", "tokens"):
        assert taken(SharedRateLimiter(store, kind, 1, 1))
    client = redis.Redis.from_url(server.url)
    assert sorted(client.keys()) == [key(kind, 1, 1).encode() for kind in ("requests", "tokens")]
    client.close()


def test_full_buckets_leave_redis_by_themselves(server, store):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    limiter.take("c")
    client = redis.Redis.from_url(server.url)
    assert 5000 < client.pttl(key("requests", 3, 10)) <= 6001
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
    stores = [made(server.url) for _ in range(4)]
    limiters = [SharedRateLimiter(store, "requests", 10, 3) for store in stores]
    start, allowed = threading.Barrier(64), []

    def ask(limiter):
        start.wait(30)
        allowed.append(taken(limiter))

    threads = [threading.Thread(target=ask, args=(limiters[i % 4],)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for store in stores:
        store.storage.get_connection().close()
    assert (len(allowed), sum(allowed)) == (64, 3)


ASK = """
import sys
from limits.storage import storage_from_string
from transformers_api.serving.limits.redis_buckets import storage_of
from transformers_api.serving.limits.token_bucket import Rate, TokenBucketRateLimiter
uri, options = storage_of(sys.argv[1])
strategy = TokenBucketRateLimiter(storage_from_string(uri, **options))
sys.stdin.read()
print(sum(strategy.hit(Rate(10, 1), "c", "requests") for _ in range(10)))
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
    limiter = SharedRateLimiter(store, "requests", 1, 3)
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
        assert [taken(limiter) for _ in range(4)] == [False] * 4  # what was spent is not forgotten
        assert taken(limiter, "other")
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "REDIS_URL answers again, rate limits are shared"
    ]


@pytest.mark.parametrize(("alone", "elsewhere"), [(3, 0), (2, 1), (1, 1), (1, 0), (0, 3), (3, 3)])
def test_what_was_spent_while_redis_was_away_is_taken_from_it(
    server, store, clock, alone, elsewhere
):
    limiter = SharedRateLimiter(store, "requests", 1, 3)
    server.kill()
    assert all(taken(limiter) for _ in range(alone))
    taken(limiter, "other")  # who finds that it is away
    server.start()
    another = made(server.url, clock)  # of another server, which shares the bucket
    assert all(taken(SharedRateLimiter(another, "requests", 1, 3)) for _ in range(elsewhere))
    another.storage.get_connection().close()
    clock.now += TRY_AGAIN_S + 1
    left = max(3 - alone - elsewhere, 0)
    assert [taken(limiter) for _ in range(5)] == [True] * left + [False] * (5 - left)
    clock.now += 170  # the bucket of this process is full; nothing is taken twice
    assert store.buckets.full_in("LIMITER/c/requests/3/1/bucket") == 0


def test_what_comes_back_while_redis_is_away_is_not_owed(server, store, clock):
    limiter = SharedRateLimiter(store, "tokens", 10, 10)
    server.kill()
    assert taken(limiter, cost=9)
    limiter.give_back("c", 8)
    server.start()
    clock.now += TRY_AGAIN_S + 1
    assert limiter.take("c", 0).remaining == 10  # six seconds bring one back
    server.kill()
    assert taken(limiter, cost=9)
    server.start()
    clock.now += TRY_AGAIN_S + 1
    assert limiter.take("c", 0).remaining == 2


def test_a_redis_that_was_restarted_between_two_requests_is_no_failure(server, store, caplog):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert taken(limiter)
    server.kill()
    server.start()
    assert limiter.take("c").remaining == 2
    assert caplog.records == []


def test_a_redis_that_hangs_holds_up_one_request_and_not_for_long(server, clock, monkeypatch):
    wait_for_redis(monkeypatch, 1.0)
    store = made(server.url, clock)
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert taken(limiter)
    server.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert taken(limiter)
        assert [taken(limiter) for _ in range(20)] == [True] * 2 + [False] * 18
        assert time.monotonic() - began < 10  # one has waited, or two, and not each
    finally:
        server.signal(signal.SIGCONT)
        store.storage.get_connection().close()


def test_a_start_without_redis_has_local_limits(tmp_path):
    store = made(f"unix://{tmp_path}/nobody.sock")
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    assert [taken(limiter) for _ in range(4)] == [True] * 3 + [False]
    store.storage.get_connection().close()


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_a_clock_of_redis_that_is_set_locks_nobody_out(server, store, jump_s):
    limiter = SharedRateLimiter(store, "requests", 10, 3)
    client = redis.Redis.from_url(server.url)
    client.set(key("requests", 3, 10), time.time() - jump_s)
    client.close()
    level = limiter.take("c")
    assert level.wait_s <= 6
    assert level.full_in_s <= 18


def test_what_stands_in_the_key_of_a_bucket_and_is_no_bucket_is_no_error(server, store):
    client = redis.Redis.from_url(server.url)
    client.rpush(key("requests", 3, 10), "x")
    client.close()
    assert taken(SharedRateLimiter(store, "requests", 10, 3))
