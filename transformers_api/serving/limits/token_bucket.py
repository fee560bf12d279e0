"""A strategy of the library `limits`: the token bucket, as niels-gpt has it.

A burst at once, then one more every few seconds. The state of a bucket is one number: the time at
which it is full again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from limits import RateLimitItem, WindowStats
from limits.limits import Granularity
from limits.storage import RedisStorage, StorageTypes
from limits.strategies import STRATEGIES, RateLimiter

from transformers_api.serving.limits.redis_buckets import RedisBuckets

NAME = "token-bucket"
MAX_BUCKETS = 65536  # in the memory of this process
ROUNDING_S = 1e-6  # a shorter wait is none


class Rate(RateLimitItem):
    """``amount`` at once, then ``multiples`` a minute; its repr, "3 per 10 bucket", parses back."""

    GRANULARITY = Granularity(60, "bucket")

    @property
    def burst(self) -> int:
        """Most that may be taken at once."""
        return self.amount

    @property
    def per_min(self) -> int:
        """Most that may be taken in the long run."""
        return self.multiples

    def get_expiry(self) -> float:  # type: ignore[override]
        """Seconds in which an empty bucket fills up."""
        return self.amount * 60 / self.multiples


@dataclass(frozen=True, slots=True)
class Level:
    """A client's bucket after a request."""

    rate: RateLimitItem
    wait_s: float  # until the cost can be taken: 0 if it was, inf if the bucket is too small
    full_in_s: float  # until the bucket is full

    @property
    def remaining(self) -> int:
        """Tokens in the bucket."""
        capacity_s = self.rate.get_expiry()
        left_s = capacity_s - self.full_in_s
        return max(0, int((left_s + ROUNDING_S) * self.rate.amount / capacity_s))


class MemoryBuckets:
    """Buckets of this process, forgotten once they are full. Thread-safe."""

    def __init__(self, clock: Callable[[], float], max_buckets: int = MAX_BUCKETS) -> None:
        self._clock = clock
        self._max = max_buckets
        self._lock = threading.Lock()
        self._full_at: dict[str, float] = {}  # in the order of the last change
        self._next_sweep = -math.inf

    def __len__(self) -> int:
        """Buckets in memory."""
        return len(self._full_at)

    def spend(self, key: str, spent_s: float, capacity_s: float) -> tuple[float, float]:
        """Delay the time at which a bucket is full by ``spent_s``, or bring it forward if negative.

        Return (seconds to wait, seconds until it is full); who has to wait has spent nothing.
        """
        with self._lock:
            now = self._clock()
            full_at = max(self._full_at.get(key, now), now)
            wait_s = full_at + spent_s - now - capacity_s
            if spent_s > 0 and wait_s > ROUNDING_S:
                return wait_s, full_at - now
            self._full_at.pop(key, None)
            full_at += spent_s
            if full_at > now:
                self._full_at[key] = full_at
                self._forget(now, capacity_s)
            return 0.0, max(full_at - now, 0.0)

    def full_in(self, key: str) -> float:
        """Seconds until a bucket is full."""
        with self._lock:
            now = self._clock()
            return max(self._full_at.get(key, now) - now, 0.0)

    def _forget(self, now: float, capacity_s: float) -> None:
        """Drop full buckets from time to time, and in a flood of clients the oldest."""
        if now >= self._next_sweep:
            self._full_at = {key: at for key, at in self._full_at.items() if at > now}
            self._next_sweep = now + capacity_s
        if len(self._full_at) > self._max:
            del self._full_at[next(iter(self._full_at))]


class TokenBucketRateLimiter(RateLimiter):
    """The strategy: buckets in the storage if that is redis, else in this process. Thread-safe.

    While redis is away each process counts for itself: no request fails for it. What a client has
    spent meanwhile is taken from redis when that client next comes.
    """

    def __init__(self, storage: StorageTypes) -> None:
        super().__init__(storage)
        self.clock: Callable[[], float] = time.monotonic  # in seconds; never goes back
        self.buckets = MemoryBuckets(self._now)
        self._latest = threading.local()
        self._redis = (
            RedisBuckets(storage, self._now) if isinstance(storage, RedisStorage) else None
        )

    @property
    def latest(self) -> Level:
        """The level that the last ``hit`` of this thread left."""
        level: Level = self._latest.level
        return level

    def hit(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        """Take ``cost`` out of the bucket and return True, if it is there."""
        self._latest.level = self.take(item, *identifiers, cost=cost)
        return not self.latest.wait_s

    def test(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        """Return True if ``hit`` would."""
        return self.take(item, *identifiers, cost=0).remaining >= cost

    def get_window_stats(self, item: RateLimitItem, *identifiers: str) -> WindowStats:
        """The time at which the bucket is full, in seconds since 1970, and what is in it now."""
        level = self.take(item, *identifiers, cost=0)
        return WindowStats(time.time() + level.full_in_s, level.remaining)

    def clear(self, item: RateLimitItem, *identifiers: str) -> None:
        """Fill the bucket."""
        self.give_back(item, *identifiers, cost=item.amount)

    def take(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> Level:
        """Take ``cost`` out of the bucket, if it is there."""
        can_fit = cost <= item.amount
        wait_s, full_in_s = self._spend(item, identifiers, cost if can_fit else 0)
        return Level(item, wait_s if can_fit else math.inf, full_in_s)

    def give_back(self, item: RateLimitItem, *identifiers: str, cost: int) -> None:
        """Put back tokens that were taken and not used."""
        self._spend(item, identifiers, -cost)

    def _spend(
        self, item: RateLimitItem, identifiers: tuple[str, ...], cost: int
    ) -> tuple[float, float]:
        key, capacity_s = item.key_for(*identifiers), item.get_expiry()
        spent_s = cost * capacity_s / item.amount
        if self._redis is None:
            return self.buckets.spend(key, spent_s, capacity_s)
        owed_s = self.buckets.full_in(key)
        level = self._redis.spend(key, spent_s, capacity_s, owed_s)
        if level is None:
            return self.buckets.spend(key, spent_s, capacity_s)
        if owed_s:
            self.buckets.spend(key, -owed_s, capacity_s)
        return level

    def _now(self) -> float:
        return self.clock()


# The library types the values of its registry as its own three.
STRATEGIES[NAME] = TokenBucketRateLimiter  # type: ignore[assignment]
