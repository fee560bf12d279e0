"""Requests in flight, of one client and of all, counted over all servers that share a redis.

A server leases a place for each request and renews it while the request lives; the places of a
server that was killed come back when their leases end. Without redis, and while it is away, each
server counts its own.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers_api.errors import Overloaded, RateLimited

if TYPE_CHECKING:
    from transformers_api.serving.shared_redis import SharedRedis

LEASE_S = 30  # after which the places of a killed server are free
RENEW_S = 10.0
AGAIN_S = 0.05  # the end of the client's request before may be on its way
PREFIX = "transformers-api:in-flight"

# In one step, by the clock of redis. A place is a member of a sorted set, until its lease ends.
_ENTER = """
local now = tonumber(redis.call('TIME')[1])
local place, lease_s = ARGV[1], tonumber(ARGV[2])
for index, key in ipairs(KEYS) do
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    local most = tonumber(ARGV[2 + index])
    if most > 0 and redis.call('ZCARD', key) >= most then
        return index
    end
end
for index, key in ipairs(KEYS) do
    redis.call('ZADD', key, now + lease_s, place)
    redis.call('EXPIRE', key, lease_s)
end
return 0
"""
_LEAVE = """
for index, key in ipairs(KEYS) do
    redis.call('ZREM', key, ARGV[1])
end
return 0
"""
ALL, CLIENT = 1, 2  # which of the two limits is reached


@dataclass(frozen=True, slots=True)
class Place:
    """A request in flight."""

    client: str
    name: str

    @property
    def keys(self) -> tuple[str, str]:
        """The sets in redis that it is in: of all, and of the client."""
        return f"{PREFIX}:all", f"{PREFIX}:client:{self.client}"


class InFlight:
    """See the module. ``most`` of all and ``most_of_client`` at once; 0 is no limit. Thread-safe.

    ``retry_after`` tells whole seconds for those that are refused.
    """

    def __init__(
        self,
        most: int,
        most_of_client: int,
        redis_url: str | None,
        retry_after: Callable[[], int],
    ) -> None:
        self._limits = most, most_of_client
        self._retry_after = retry_after
        self._redis = _redis(redis_url) if redis_url is not None and any(self._limits) else None
        self._lock = threading.Lock()
        self._places: set[Place] = set()
        self._counts: Counter[str] = Counter()
        self._keeper: threading.Thread | None = None
        self._is_closed = threading.Event()

    def enter(self, client: str) -> Place | None:
        """A place, which has to be given back; None where there are no limits.

        Raises Overloaded where all are taken, RateLimited where the client has as many as it may.
        """
        if not any(self._limits):
            return None
        place = Place(client, uuid.uuid4().hex)
        reached = self._entered(place)
        if reached == CLIENT:
            time.sleep(AGAIN_S)
            reached = self._entered(place)
        if reached == CLIENT:
            raise RateLimited(
                f"{self._limits[1]} requests of this client are in flight, as many as it may have",
                retry_after=self._retry_after(),
            )
        if reached:
            raise Overloaded("Too many requests are in flight", retry_after=self._retry_after())
        return place

    def leave(self, place: Place) -> None:
        """Give a place back. Idempotent."""
        with self._lock:
            if place not in self._places:
                return
            self._places.remove(place)
            self._counts[place.client] -= 1
            if not self._counts[place.client]:
                del self._counts[place.client]
        self._command(_LEAVE, place)

    def close(self) -> None:
        """Close the connections to redis."""
        self._is_closed.set()
        if self._redis is not None:
            self._redis.close()

    def _entered(self, place: Place) -> int:
        """0 and the place is taken, or the limit that is reached."""
        reached = self._command(_ENTER, place, LEASE_S, *self._limits)
        with self._lock:
            if reached is None:  # each server counts its own
                most, most_of_client = self._limits
                if most and len(self._places) >= most:
                    return ALL
                if most_of_client and self._counts[place.client] >= most_of_client:
                    return CLIENT
            elif reached:
                return reached
            self._places.add(place)
            self._counts[place.client] += 1
            if self._redis is not None and self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="in-flight", daemon=True)
                self._keeper.start()
        return 0

    def _command(self, script: str, place: Place, *numbers: int) -> int | None:
        if self._redis is None:
            return None
        answer = self._redis.command("EVAL", script, 2, *place.keys, place.name, *numbers)
        return None if answer is None else int(answer)

    def _keep(self) -> None:
        while not self._is_closed.wait(RENEW_S):
            self.renew()

    def renew(self) -> None:
        """Renew the leases of all places; a redis that has forgotten them learns of them again."""
        with self._lock:
            places = list(self._places)
        for place in places:
            self._command(_ENTER, place, LEASE_S, 0, 0)
            with self._lock:
                is_over = place not in self._places
            if is_over:
                self._command(_LEAVE, place)


def _redis(url: str) -> SharedRedis:
    from transformers_api.serving.shared_redis import SharedRedis

    return SharedRedis(url, "requests in flight")
