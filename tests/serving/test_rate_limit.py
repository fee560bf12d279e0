"""A token bucket for each client: how much at once, how much in the long run, what is forgotten."""

from __future__ import annotations

import math
import threading
import time
import tracemalloc
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import parse
from limits.storage import storage_from_string
from limits.strategies import STRATEGIES

from transformers_api.serving.limits.access import network
from transformers_api.serving.limits.token_bucket import NAME, MemoryBuckets, Rate


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class RateLimiter:
    """The strategy as flask-limiter makes it, for clients of one rate."""

    def __init__(self, per_min, burst, clock=time.monotonic, most_clients=1000):
        self.strategy = STRATEGIES[NAME](storage_from_string("memory://"))
        self.strategy.clock = clock
        self.strategy.buckets = MemoryBuckets(clock, most_clients)
        self.rate = parse(f"{burst} per {per_min} bucket")

    def __len__(self):
        return len(self.strategy.buckets)

    def take(self, client, cost=1):
        return self.strategy.take(self.rate, client, cost=cost)

    def give_back(self, client, cost):
        self.strategy.give_back(self.rate, client, cost=cost)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limiter(clock):
    """The seed's own numbers: one token in six seconds, three at once."""
    return RateLimiter(10, 3, clock=clock)


def test_a_burst_is_allowed_and_no_more(limiter):
    assert [limiter.take("1.2.3.4").wait_s for _ in range(3)] == [0, 0, 0]
    assert limiter.take("1.2.3.4").wait_s == pytest.approx(6)


def test_a_token_comes_back_after_its_time(limiter, clock):
    for _ in range(3):
        limiter.take("1.2.3.4")
    clock.now += 5.9
    assert limiter.take("1.2.3.4").wait_s == pytest.approx(0.1)
    clock.now += 0.1
    assert limiter.take("1.2.3.4").wait_s == 0
    assert limiter.take("1.2.3.4").wait_s == pytest.approx(6)


def test_who_waits_long_gets_the_burst_again_and_not_more(limiter, clock):
    for _ in range(3):
        limiter.take("1.2.3.4")
    clock.now += 3600
    assert [limiter.take("1.2.3.4").wait_s for _ in range(3)] == [0, 0, 0]
    assert limiter.take("1.2.3.4").wait_s > 0


def test_a_refused_request_takes_nothing(limiter, clock):
    for _ in range(50):
        limiter.take("1.2.3.4")
    clock.now += 6
    assert limiter.take("1.2.3.4").wait_s == 0


def test_clients_have_buckets_of_their_own(limiter):
    for _ in range(4):
        limiter.take("1.2.3.4")
    assert limiter.take("1.2.3.5").wait_s == 0


def test_full_buckets_are_forgotten(limiter, clock):
    for host in range(200):
        limiter.take(f"10.0.0.{host}")
    assert len(limiter) == 200
    clock.now += 18
    limiter.take("1.2.3.4")
    assert len(limiter) == 1


def test_a_flood_of_addresses_forgets_who_asked_longest_ago(clock):
    limiter = RateLimiter(10, 1, clock=clock, most_clients=3)
    for host in "abcd":
        limiter.take(host)
    assert len(limiter) == 3
    assert limiter.take("d").wait_s > 0
    assert limiter.take("a").wait_s == 0


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:0DB8:1:2:bbbb:0:0:2", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
    ],
)
def test_an_address_stands_for_its_network(address, client):
    assert network(address) == client


def test_threads_share_the_tokens(clock):
    limiter = RateLimiter(1, 50, clock=clock)
    start = threading.Barrier(8)
    allowed: list[float] = []

    def ask() -> None:
        start.wait(30)
        for _ in range(25):
            allowed.append(limiter.take("1.2.3.4").wait_s)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(allowed) == 200
    assert allowed.count(0) == 50


@given(
    per_min=st.integers(1, 1000),
    burst=st.integers(1, 20),
    pauses=st.lists(st.floats(0, 100), max_size=60),
)
def test_no_window_has_more_than_the_burst_and_what_came_back(per_min, burst, pauses):
    clock = Clock()
    limiter = RateLimiter(per_min, burst, clock=clock)
    began, allowed = clock.now, 0
    for pause in pauses:
        clock.now += pause
        wait_s = limiter.take("c").wait_s
        allowed += not wait_s
        assert allowed <= burst + (clock.now - began) * per_min / 60 + 1e-6
        if wait_s:  # what it says is enough
            clock.now += wait_s
            assert limiter.take("c").wait_s == 0
            allowed += 1


def test_what_is_left_and_when_all_is_back(limiter, clock):
    first = limiter.take("c")
    assert (first.remaining, first.full_in_s) == (2, pytest.approx(6))
    clock.now += 3
    second = limiter.take("c")
    assert (second.remaining, second.full_in_s) == (1, pytest.approx(9))
    third = limiter.take("c")
    assert (third.remaining, third.full_in_s) == (0, pytest.approx(15))
    refused = limiter.take("c")
    assert (refused.remaining, refused.full_in_s) == (0, pytest.approx(15))
    assert refused.wait_s == pytest.approx(3)


def test_a_cost_is_taken_whole_or_not_at_all(clock):
    limiter = RateLimiter(600, 600, clock=clock)
    assert limiter.take("c", 400).remaining == 200
    refused = limiter.take("c", 300)
    assert (refused.remaining, refused.wait_s) == (200, pytest.approx(10))
    assert limiter.take("c", 200).remaining == 0


def test_more_than_a_bucket_holds_is_never_there_and_takes_nothing(clock):
    limiter = RateLimiter(600, 600, clock=clock)
    assert limiter.take("c", 601).wait_s == math.inf
    assert limiter.take("c", 600).wait_s == 0


def test_what_was_not_needed_comes_back_and_never_more_than_there_was(clock):
    limiter = RateLimiter(600, 600, clock=clock)
    limiter.take("c", 500)
    limiter.give_back("c", 450)
    assert limiter.take("c", 1).remaining == 549
    clock.now += 60
    limiter.give_back("c", 600)
    limiter.give_back("nobody", 600)
    assert limiter.take("c", 1).remaining == 599
    assert limiter.take("nobody", 1).remaining == 599


def test_the_library_asks_without_taking_and_fills_a_bucket(limiter, clock):
    strategy, rate = limiter.strategy, limiter.rate
    assert [strategy.test(rate, "c", cost=cost) for cost in (1, 3, 4)] == [True, True, False]
    assert [strategy.hit(rate, "c", cost=cost) for cost in (2, 2)] == [True, False]
    assert strategy.latest.wait_s == pytest.approx(6)
    assert [strategy.test(rate, "c", cost=cost) for cost in (1, 2)] == [True, False]
    window = strategy.get_window_stats(rate, "c")
    assert window.remaining == 1
    assert window.reset_time == pytest.approx(time.time() + 12, abs=1)
    strategy.clear(rate, "c")
    assert strategy.get_window_stats(rate, "c").remaining == 3
    assert len(limiter) == 0


def test_a_rate_is_read_from_its_own_words():
    rate = Rate(3, 10)
    assert parse(repr(rate)) == rate
    assert (rate.burst, rate.per_min, rate.get_expiry()) == (3, 10, 18)
    assert Rate(3, 7).get_expiry() == pytest.approx(180 / 7)


class SeedBucket:
    """niels-gpt's own: a float that fills up."""

    def __init__(self, per_min, burst, now):
        self.rate, self.burst, self.level, self.last = per_min / 60, burst, float(burst), now

    def take(self, now):
        self.level = min(self.burst, self.level + (now - self.last) * self.rate)
        self.last = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


@pytest.mark.parametrize("mean_s", [0.5, 3.0, 6.0, 12.0])
def test_a_thousand_random_arrivals_are_decided_as_the_seed_decides(limiter, clock, mean_s):
    seed, random = SeedBucket(10, 3, clock.now), Random(5)
    decided = []
    for _ in range(1000):
        clock.now += random.expovariate(1 / mean_s)
        decided.append((limiter.strategy.hit(limiter.rate, "c"), seed.take(clock.now)))
    assert all(ours is theirs for ours, theirs in decided)
    assert 0 < sum(ours for ours, _ in decided) < 1000


def test_sixty_four_at_once_get_the_burst_and_no_more():
    limiter, start, allowed = RateLimiter(10, 3), threading.Barrier(64), []

    def ask():
        start.wait(30)
        allowed.append(limiter.take("c").wait_s == 0)

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(allowed), sum(allowed)) == (64, 3)


def test_a_flood_of_addresses_stays_within_bounds(clock):
    """Of IPv6, of which one client has as many as it likes, and of IPv4."""
    limiter = RateLimiter(10, 3, clock=clock, most_clients=1000)
    for number in range(10_000):
        limiter.take(network(f"2001:db8::{number:x}"))
    assert len(limiter) == 1
    tracemalloc.start()
    for number in range(10_000):
        limiter.take(network(f"10.1.{number // 256}.{number % 256}"))
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(limiter) == 1000
    assert most_bytes < 1 << 20


def test_a_clock_on_the_wall_that_is_set_changes_nothing(monkeypatch):
    limiter = RateLimiter(10, 3)
    assert [limiter.take("c").wait_s for _ in range(3)] == [0, 0, 0]
    for jump_s in (3600, -3600):
        now = time.time() + jump_s
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert 5 < limiter.take("c").wait_s <= 6
