"""The same buckets in redis, for several servers that share their clients.

While redis is away each server counts for itself: nobody gets an error for it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from transformers_api.serving.limits.rate_limit import Level, Rate, RateLimiter

log = logging.getLogger(__name__)

TIMEOUT_S = 0.25  # a request waits no longer for redis
TRY_AGAIN_S = 5.0
PREFIX = "transformers-api:limit"

# In one step, by the clock of redis: when the bucket is full again, as in RateLimiter.
_TAKE = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local spent, capacity = tonumber(ARGV[1]), tonumber(ARGV[2])
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
full_at = math.min(full_at, now + capacity) -- later only if the clock was set back
local wait = full_at + spent - now - capacity
if spent > 0 and wait > 1e-6 then
    return {string.format('%.6f', wait), string.format('%.6f', full_at - now)}
end
full_at = full_at + spent
if full_at > now then
    local ms = math.ceil((full_at - now) * 1000)
    redis.call('SET', KEYS[1], string.format('%.6f', full_at), 'PX', ms)
else
    redis.call('DEL', KEYS[1])
end
return {'0', string.format('%.6f', math.max(full_at - now, 0))}
"""


class Redis:
    """One redis: asked while it answers, and once in a while when it does not. Thread-safe."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # A connection from before its restart; what is silent is not asked twice.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        self._take = self._redis.register_script(_TAKE)
        self._clock = clock
        self._lock = threading.Lock()
        self._is_away = False
        self._try_at = 0.0

    def spend(self, key: str, spent_s: float, capacity_s: float) -> tuple[float, float] | None:
        """(seconds to wait, seconds until it is full again) of a bucket; None: redis is away."""
        if not self._may_try():
            return None
        try:
            wait, full_in = self._take(keys=[key], args=[spent_s, capacity_s])
        except redis.RedisError as error:
            self._lost(error)
            return None
        self._found()
        return float(wait), float(full_in)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _may_try(self) -> bool:
        """Whether this request asks; of those that come while redis is away, one in a while."""
        with self._lock:
            if not self._is_away:
                return True
            if self._clock() < self._try_at:
                return False
            self._try_at = self._clock() + TRY_AGAIN_S
            return True

    def _lost(self, error: redis.RedisError) -> None:
        with self._lock:
            was_away, self._is_away = self._is_away, True
            self._try_at = self._clock() + TRY_AGAIN_S
        if not was_away:
            log.error("REDIS_URL does not answer, rate limits are local until it does: %s", error)

    def _found(self) -> None:
        if not self._is_away:
            return
        with self._lock:
            was_away, self._is_away = self._is_away, False
        if was_away:
            log.info("REDIS_URL answers again, rate limits are shared")


class SharedRateLimiter:
    """Buckets in redis, and in this process while redis is away. ``kind`` keeps them apart."""

    def __init__(self, store: Redis, kind: str, per_min: int, burst: int) -> None:
        self._store = store
        self._kind = kind
        self._local = RateLimiter(per_min, burst)

    @property
    def rate(self) -> Rate:
        """What each client may take."""
        return self._local.rate

    def take(self, client: str, cost: int = 1) -> Level:
        """Take ``cost`` out of this client's bucket, if it is there."""
        if not self.rate.per_min:
            return self._local.take(client, cost)
        found = self._spend(client, cost if cost <= self.rate.burst else 0)
        if found is None:
            return self._local.take(client, cost)
        wait_s, full_in_s = found
        return Level(self.rate, wait_s if cost <= self.rate.burst else math.inf, full_in_s)

    def give_back(self, client: str, cost: int) -> None:
        """Put back what was taken and not needed."""
        if self._spend(client, -cost) is None:
            self._local.give_back(client, cost)

    def _spend(self, client: str, cost: int) -> tuple[float, float] | None:
        key = f"{PREFIX}:{self._kind}:{client}"
        return self._store.spend(key, cost * self.rate.interval_s, self.rate.capacity_s)
