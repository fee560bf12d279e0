"""Requests in flight over several servers that share a real redis, which may be killed."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import redis

from tests.redis_server import RedisServer, wait_for_redis
from transformers_api.errors import Overloaded, RateLimited
from transformers_api.serving.limits import in_flight
from transformers_api.serving.limits.in_flight import InFlight, Place


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = RedisServer(tmp_path_factory.mktemp("redis"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def counts(server, monkeypatch):
    wait_for_redis(monkeypatch)
    monkeypatch.setattr(in_flight, "AGAIN_S", 0.0)
    client = redis.Redis.from_url(server.url)
    client.flushall()
    client.close()
    made: list[InFlight] = []

    def build(most: int, most_of_client: int, url: str | None = server.url) -> InFlight:
        made.append(InFlight(most, most_of_client, url, lambda: 7))
        return made[-1]

    yield build
    for each in made:
        each.close()


def fill(counts: InFlight, client: str = "a", most: int = 100) -> list[Place]:
    """As many places as there are, at most ``most``."""
    places: list[Place] = []
    while len(places) < most:
        try:
            place = counts.enter(client)
        except Overloaded:
            break
        assert place is not None
        places.append(place)
    return places


def test_a_client_has_so_many_on_all_servers_together(counts):
    one, two = counts(0, 3), counts(0, 3)
    fill(one, most=2)
    (place,) = fill(two)
    with pytest.raises(RateLimited, match="3 requests of this client") as caught:
        one.enter("a")
    assert caught.value.retry_after == 7
    assert len(fill(two, "b")) == 3
    two.leave(place)
    two.leave(place)
    assert len(fill(one)) == 1


def test_all_clients_have_so_many_together(counts):
    one, two = counts(4, 0), counts(4, 0)
    places = fill(one, "a", 2) + fill(two, "b")
    assert len(places) == 4
    with pytest.raises(Overloaded, match="Too many requests are in flight") as caught:
        one.enter("c")
    assert type(caught.value) is Overloaded
    one.leave(places[0])
    assert len(fill(two, "c")) == 1


def test_many_at_once_get_no_more_than_there_are(counts):
    servers = [counts(0, 5) for _ in range(4)]
    places: list[Place] = []
    threads = [
        threading.Thread(target=lambda each=each: places.extend(fill(each, most=5)))
        for each in servers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 5


def test_a_limit_of_all_takes_nothing_of_a_refused_client(counts):
    one = counts(3, 2)
    assert len(fill(one, "a")) == 2
    assert len(fill(one, "b")) == 1
    assert fill(one, "a") == []


def pass_time(server: RedisServer, seconds: int) -> None:
    """Let every lease in redis end so much sooner."""
    client = redis.Redis.from_url(server.url)
    for key in client.keys(f"{in_flight.PREFIX}:*"):
        for place in client.zrange(key, 0, -1):
            client.zincrby(key, -seconds, place)
    client.close()


def test_places_of_a_killed_server_come_back(counts, server):
    one, two = counts(0, 2), counts(0, 2)
    fill(one)
    pass_time(server, in_flight.LEASE_S // 2)
    assert fill(two) == []
    pass_time(server, in_flight.LEASE_S // 2 + 1)
    assert len(fill(two)) == 2


def test_what_lives_keeps_its_place(counts, server):
    one, two = counts(0, 1), counts(0, 1)
    fill(one)
    for _ in range(4):
        pass_time(server, in_flight.LEASE_S // 2)
        one.renew()
        assert fill(two) == []


def test_each_counts_its_own_while_redis_is_away(counts, tmp_path):
    own = RedisServer(tmp_path)
    own.start()
    one, two = counts(0, 2, own.url), counts(0, 2, own.url)
    fill(one)
    own.kill()
    assert fill(one) == []
    assert len(fill(two)) == 2
    own.start()
    for each in (one, two):  # as after TRY_AGAIN_S
        each._redis._away_until = 0.0
        each.renew()
    assert fill(one) == fill(two) == []
    own.kill()


def test_nobody_waits_long_for_a_redis_that_hangs(counts, tmp_path, monkeypatch):
    wait_for_redis(monkeypatch, 1.0)
    own = RedisServer(tmp_path)
    own.start()
    one = counts(0, 50, own.url)
    fill(one, most=1)
    own.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert len(fill(one, most=20)) == 20
    assert time.monotonic() - began < 10  # one has waited, or two, and not each
    own.signal(signal.SIGCONT)
    own.kill()


def test_without_redis_a_server_counts_its_own(counts):
    one, two = counts(3, 2, None), counts(3, 2, None)
    places = fill(one, "a")
    assert len(places) == 2
    assert len(fill(one, "b")) == 1
    assert len(fill(two, "a")) == 2
    one.leave(places[0])
    assert len(fill(one, "a")) == 1


def test_without_limits_nobody_is_asked(counts):
    one = counts(0, 0, "redis://127.0.0.1:9/0")
    assert one.enter("a") is None
    assert one._redis is None


def test_the_end_of_the_request_before_may_be_on_its_way(counts, monkeypatch):
    one = counts(0, 1)
    (place,) = fill(one)
    monkeypatch.setattr(in_flight.time, "sleep", lambda _: one.leave(place))
    assert one.enter("a") is not None
