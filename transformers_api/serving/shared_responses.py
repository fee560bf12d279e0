"""Answers of /v1/responses in redis, for fronts of one cluster: any of them goes on from one."""

from __future__ import annotations

import orjson

from transformers_api.serving.response_store import ResponseStore, StoredResponse
from transformers_api.serving.shared_redis import SharedRedis

PREFIX = "transformers-api:response:"


class SharedResponses(ResponseStore):
    """A ResponseStore that redis has, too. While redis is away this front's own answers are there.

    An answer is of its owner, as ever; redis drops it ``most_age_s`` after its last use.
    """

    def __init__(self, redis_url: str, most_bytes: int, most_age_s: float) -> None:
        super().__init__(most_bytes, most_age_s)
        self._redis = SharedRedis(redis_url, "answers")
        self._age_s = max(int(most_age_s), 1)
        self._largest = most_bytes

    def put(self, response_id: str, response: StoredResponse) -> None:
        """See ResponseStore."""
        super().put(response_id, response)
        content = [response.owner, response.body, response.items, response.messages]
        text = orjson.dumps(content, default=str)
        if len(text) <= self._largest:
            self._redis.command("SET", PREFIX + response_id, text, "EX", self._age_s)

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """See ResponseStore."""
        text = self._redis.command("GETEX", PREFIX + response_id, "EX", self._age_s)
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
            self._redis.command("DEL", PREFIX + response_id)
        return is_there
