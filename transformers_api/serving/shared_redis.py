"""A redis that the fronts of one cluster share, and that none of them waits for long."""

from __future__ import annotations

import logging
import time
from typing import Any

import redis

from transformers_api.serving import redis_times

log = logging.getLogger(__name__)


class RedisAway(ConnectionError):
    """Redis does not answer, or not as it should; ``is_news`` when it was asked just now."""

    def __init__(self, message: str, *, is_news: bool = False) -> None:
        super().__init__(message)
        self.is_news = is_news


class SharedRedis:
    """Commands to one redis; ``contents`` names in the log what is there. From any thread."""

    def __init__(self, redis_url: str, contents: str) -> None:
        timeout_s = redis_times.TIMEOUT_S
        self._redis = redis.Redis.from_url(
            redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        )
        self._contents = contents
        self._away_until = 0.0

    def command(self, *words: str | bytes | int) -> Any:
        """The answer of redis; None where it is away, or has nothing."""
        try:
            return self.ask(*words)
        except RedisAway as error:
            self.warn(error)
            return None

    def ask(self, *words: str | bytes | int) -> Any:
        """The answer of redis. Raises RedisAway, at once for a while after the first time."""
        if time.monotonic() < self._away_until:
            raise RedisAway("Redis is away")
        try:
            return self._redis.execute_command(*words)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self._away_until = time.monotonic() + redis_times.TRY_AGAIN_S
            raise RedisAway(f"Redis is away: {error}", is_news=True) from None

    def warn(self, error: RedisAway) -> None:
        """Log that it is away, unless nobody asked it this time."""
        if error.is_news:
            log.warning("%s; %s are shared again when it is back", error, self._contents)

    def close(self) -> None:
        """Close its connections."""
        self._redis.close()
