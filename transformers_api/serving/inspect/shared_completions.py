"""The tokens of recent completions in redis, for fronts of one cluster: any of them has them."""

from __future__ import annotations

import orjson

from transformers_api.serving.inspect.recent_completions import (
    MAX_AGE_S,
    Completion,
    Completions,
)
from transformers_api.serving.shared_redis import SharedRedis

PREFIX = "transformers-api:completion:"
MAX_SHARED = 256  # of all fronts together
MAX_BYTES = 1 << 20  # of one completion; a larger one stays with the front that made it

# The oldest of more than ARGV[3] go; the order of those that have expired goes with it.
PUT = """
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
local clock = redis.call('TIME')
redis.call('ZADD', KEYS[2], clock[1] + clock[2] / 1e6, KEYS[1])
redis.call('EXPIRE', KEYS[2], ARGV[2])
local oldest = redis.call('ZRANGE', KEYS[2], 0, -1 - ARGV[3])
for _, key in ipairs(oldest) do
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[2], key)
end
"""
ORDER = "transformers-api:completions"


class SharedCompletions(Completions):
    """Completions that redis has, too. While redis is away this front's own are there."""

    def __init__(self, redis_url: str, most: int = MAX_SHARED) -> None:
        super().__init__()
        self._bound = most
        self._redis = SharedRedis(redis_url, "recent completions")

    def close(self) -> None:
        """Close the connections to redis."""
        self._redis.close()

    def _put(self, completion_id: str, choices: list[Completion]) -> None:
        super()._put(completion_id, choices)
        text = _text(choices)
        if len(text) <= MAX_BYTES:
            keys = (PREFIX + completion_id, ORDER)
            self._redis.command("EVAL", PUT, len(keys), *keys, text, int(MAX_AGE_S), self._bound)

    def _get(self, completion_id: str) -> list[Completion]:
        choices = super()._get(completion_id)
        if choices:
            return choices
        text = self._redis.command("GET", PREFIX + completion_id)
        return [] if text is None else _choices(text)


def _text(choices: list[Completion]) -> bytes:
    """JSON with each prompt once: [[model, place of its prompt, token ids, …], prompts]."""
    prompts = list(dict.fromkeys(each.prompt_ids for each in choices))
    places = {prompt: place for place, prompt in enumerate(prompts)}
    rows = [
        (each.model, places[each.prompt_ids], each.token_ids, each.owner, each.is_edited)
        for each in choices
    ]
    return orjson.dumps((rows, prompts))


def _choices(text: bytes) -> list[Completion]:
    rows, prompts = orjson.loads(text)
    return [
        Completion(model, tuple(prompts[place]), tuple(token_ids), *more)
        for model, place, token_ids, *more in rows
    ]
