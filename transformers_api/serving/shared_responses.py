"""Answers of /v1/responses in redis, for fronts of one cluster: any of them goes on from one."""

from __future__ import annotations

import logging
import time
from typing import Any

import orjson
import redis

from transformers_api.serving.response_store import ResponseStore, StoredResponse

log = logging.getLogger(__name__)

TIMEOUT_S = 0.25  # a request waits no longer for redis
TRY_AGAIN_S = 5.0
PREFIX = "transformers-api:response:"


class SharedResponses(ResponseStore):
    """A ResponseStore that redis has, too. While redis is away this front's own answers are there.

    An answer is of its owner, as ever; redis drops it ``most_age_s`` after its last use.
    """

    def __init__(self, redis_url: str, most_bytes: int, most_age_s: float) -> None:
        super().__init__(most_bytes, most_age_s)
        self._redis = redis.Redis.from_url(
            redis_url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )
        self._age_s = max(int(most_age_s), 1)
        self._largest = most_bytes
        self._away_until = 0.0

    def put(self, response_id: str, response: StoredResponse) -> None:
        """See ResponseStore."""
        super().put(response_id, response)
        content = [response.owner, response.body, response.items, response.messages]
        text = orjson.dumps(content, default=str)
        if len(text) <= self._largest:
            self._command("SET", PREFIX + response_id, text, "EX", self._age_s)

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """See ResponseStore."""
        text = self._command("GETEX", PREFIX + response_id, "EX", self._age_s)
        if text is None:
            return super().get(response_id, owner)
        own, body, items, messages = orjson.loads(text)
        if own != owner:
            return None
        return StoredResponse(body=body, items=items, messages=messages, owner=own)

    def delete(self, response_id: str, owner: str) -> bool:
        """See ResponseStore."""
        is_there = self.get(response_id, owner) is not None
        super().delete(response_id, owner)
        if is_there:
            self._command("DEL", PREFIX + response_id)
        return is_there

    def _command(self, *words: str | bytes | int) -> Any:
        """The answer of redis; None where it is away, or has nothing."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return self._redis.execute_command(*words)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self._away_until = time.monotonic() + TRY_AGAIN_S
            log.warning("Redis is away, answers are shared again when it is back: %s", error)
            return None
