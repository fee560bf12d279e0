"""Token buckets in redis, for several servers that share their clients."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from limits.storage import RedisStorage

from transformers_api.serving import redis_times

log = logging.getLogger(__name__)

PREFIX = "transformers-api:limit"

# In one step, by the clock of redis: the arithmetic of MemoryBuckets.spend. What was spent while
# redis was away is taken first, whether there is room for it or not.
_SPEND = b"""
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local spent, capacity = tonumber(ARGV[1]), tonumber(ARGV[2])
local owed = tonumber(ARGV[3])
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + owed
full_at = math.min(full_at, now + capacity) -- later also if the clock was set back
local wait = full_at + spent - now - capacity
if spent > 0 and wait > 1e-6 then
    if owed > 0 then
        local ms = math.ceil((full_at - now) * 1000)
        redis.call('SET', KEYS[1], string.format('%.6f', full_at), 'PX', ms)
    end
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


def storage_of(redis_url: str | None) -> tuple[str, dict[str, Any]]:
    """The URI and the options of the storage for REDIS_URL; None is the memory of this process."""
    if redis_url is None:
        return "memory://", {}
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    # A connection from before the restart of redis is tried again; silence is not.
    retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
    return redis_url.replace("unix://", "redis+unix://", 1), {
        "key_prefix": PREFIX,
        "socket_timeout": redis_times.TIMEOUT_S,
        "socket_connect_timeout": redis_times.TIMEOUT_S,
        "retry": retry,
    }


class RedisBuckets:
    """One redis: asked while it answers, and once in a while when it does not. Thread-safe."""

    def __init__(self, storage: RedisStorage, clock: Callable[[], float]) -> None:
        self._storage = storage
        self._script = storage.get_connection().register_script(_SPEND)
        self._clock = clock
        self._lock = threading.Lock()
        self._is_away = False
        self._try_at = 0.0

    def spend(
        self, key: str, spent_s: float, capacity_s: float, owed_s: float
    ) -> tuple[float, float] | None:
        """(seconds to wait, seconds until it is full) of a bucket; None: redis is away.

        ``owed_s``: what was spent while it was away, and has not come back since.
        """
        if not self._may_try():
            return None
        try:
            wait, full_in = self._script(
                keys=[self._storage.prefixed_key(key)],
                args=[spent_s, capacity_s, owed_s],
            )
        except self._storage.base_exceptions as error:
            self._lost(error)
            return None
        self._answered()
        return float(wait), float(full_in)

    def _may_try(self) -> bool:
        """True for every request while redis answers, and for one in a while when it does not."""
        with self._lock:
            if not self._is_away:
                return True
            if self._clock() < self._try_at:
                return False
            self._try_at = self._clock() + redis_times.TRY_AGAIN_S
            return True

    def _lost(self, error: Exception) -> None:
        with self._lock:
            was_away, self._is_away = self._is_away, True
            self._try_at = self._clock() + redis_times.TRY_AGAIN_S
        if not was_away:
            log.error("REDIS_URL does not answer, rate limits are local until it does: %s", error)

    def _answered(self) -> None:
        if not self._is_away:
            return
        with self._lock:
            was_away, self._is_away = self._is_away, False
        if was_away:
            log.info("REDIS_URL answers again, rate limits are shared")
