"""API keys in redis, for all servers that share it."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from transformers_api.serving import redis_times
from transformers_api.serving.limits.api_keys import ApiKey, check_name, make, parse, taken
from transformers_api.serving.shared_redis import RedisAway, SharedRedis

log = logging.getLogger(__name__)

# A hash: the value of a name is scope:sha256$hash, that of no name another one after each change.
HASH = "transformers-api:keys"
VERSION = ""
FRESH_S = 1.0  # a server asks for the version no more often

ADD = """
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('HSET', KEYS[1], '', ARGV[3])
return 1
"""
REMOVE = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], '', ARGV[2])
return 1
"""


class KeyRedis:
    """A KeyStore. A redis that is away, or has lost its keys, changes nothing in a server."""

    def __init__(self, redis_url: str) -> None:
        self._redis = SharedRedis(redis_url, "API keys")
        self._entries: dict[bytes, bytes] | None = None  # not read yet
        self._version: bytes | None = None
        self._ask_at = 0.0

    def __str__(self) -> str:
        return "Redis"

    def version(self) -> bytes | None:
        """See KeyStore; of a second ago at most, while redis answers."""
        now = time.monotonic()
        if now >= self._ask_at:
            self._ask_at = now + FRESH_S
            try:
                self._refresh()
            except RedisAway as error:
                self._redis.warn(error)
        return self._version

    def read(self) -> list[ApiKey]:
        """See KeyStore: the keys of ``version``. RedisAway is an OSError."""
        if self._entries is None:
            self._refresh()
        entries = sorted((self._entries or {}).items())
        return parse(f"{name.decode()}:{value.decode()}" for name, value in entries)

    def _refresh(self) -> None:
        if self._entries is not None and self._ask("HGET", VERSION) == self._version:
            return
        entries = self._ask("HGETALL")
        version = entries.pop(VERSION.encode(), None)
        if version is None and self._version is not None:
            log.error("Redis has lost the API keys: those from before stay valid")
            self._ask_at = time.monotonic() + redis_times.TRY_AGAIN_S
            return
        self._entries = entries  # first: who sees the version may read them
        self._version = version

    def _ask(self, command: str, *words: str) -> Any:
        return self._redis.ask(command, HASH, *words)

    def add(self, name: str, scope: str) -> str:
        """See KeyStore."""
        secret, key = make(name, scope)
        entry = key.line().partition(":")[2]
        if not self._redis.ask("EVAL", ADD, 1, HASH, name, entry, secrets.token_hex(8)):
            raise taken(self, name)
        return secret

    def remove(self, name: str) -> None:
        """See KeyStore."""
        check_name(name)
        if not self._redis.ask("EVAL", REMOVE, 1, HASH, name, secrets.token_hex(8)):
            raise ValueError(f"{self} has no key of the name {name}")
