"""How often one client may ask: a token bucket for each, forgotten once it is full again."""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

MOST_CLIENTS = 65536  # that are remembered at once
ROUNDING_S = 1e-6  # what is so little away is there
_IPV6_NETWORK = 64  # bits: what one household or machine is given


@dataclass(frozen=True, slots=True)
class Rate:
    """``burst`` at once, then ``per_min`` a minute; ``per_min`` 0 is no limit."""

    per_min: int
    burst: int

    @property
    def interval_s(self) -> float:
        """Seconds until one more is there."""
        return 60 / self.per_min if self.per_min else 0.0

    @property
    def capacity_s(self) -> float:
        """Seconds until an empty bucket is full."""
        return self.burst * self.interval_s


@dataclass(frozen=True, slots=True)
class Level:
    """A client's bucket after it was asked."""

    rate: Rate
    wait_s: float  # until what was asked for is there: 0 if it was taken, inf if it never will be
    full_in_s: float  # until the bucket is full again

    @property
    def remaining(self) -> int:
        """How much is left."""
        if not self.rate.per_min:
            return self.rate.burst
        left_s = self.rate.capacity_s - self.full_in_s
        return max(0, int((left_s + ROUNDING_S) / self.rate.interval_s))


class Limiter(Protocol):
    """Buckets of one rate. Thread-safe."""

    @property
    def rate(self) -> Rate:
        """What each client may take."""
        ...

    def take(self, client: str, cost: int = 1) -> Level:
        """Take ``cost`` out of this client's bucket, if it is there."""
        ...

    def give_back(self, client: str, cost: int) -> None:
        """Put back what was taken and not needed."""
        ...


class RateLimiter:
    """Buckets in the memory of this process. ``clock`` is in seconds and never goes back."""

    def __init__(
        self,
        per_min: int,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        most_clients: int = MOST_CLIENTS,
    ) -> None:
        self._rate = Rate(per_min, burst)
        self._clock = clock
        self._most = most_clients
        self._lock = threading.Lock()
        # When the bucket of a client is full again: all that there is to know of it. In the order
        # of the last request that was allowed.
        self._full_at: dict[str, float] = {}
        self._next_sweep = 0.0

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._full_at)

    @property
    def rate(self) -> Rate:
        """What each client may take."""
        return self._rate

    def take(self, client: str, cost: int = 1) -> Level:
        """Take ``cost`` out of this client's bucket, if it is there."""
        rate = self._rate
        if not rate.per_min:
            return Level(rate, 0.0, 0.0)
        spent_s = cost * rate.interval_s
        with self._lock:
            now = self._clock()
            full_at = max(self._full_at.get(client, now), now)
            if cost > rate.burst:
                return Level(rate, math.inf, full_at - now)
            wait_s = full_at + spent_s - now - rate.capacity_s
            if wait_s > ROUNDING_S:
                return Level(rate, wait_s, full_at - now)
            full_at += spent_s
            self._full_at.pop(client, None)
            self._full_at[client] = full_at
            self._forget(now)
        return Level(rate, 0.0, full_at - now)

    def give_back(self, client: str, cost: int) -> None:
        """Put back what was taken and not needed."""
        with self._lock:
            if client in self._full_at:  # else it is full
                self._full_at[client] -= cost * self._rate.interval_s

    def _forget(self, now: float) -> None:
        """Full buckets from time to time; in a flood of addresses who asked longest ago."""
        if now >= self._next_sweep:
            self._full_at = {c: full_at for c, full_at in self._full_at.items() if full_at > now}
            self._next_sweep = now + self._rate.capacity_s
        if len(self._full_at) > self._most:
            del self._full_at[next(iter(self._full_at))]


def network(address: str) -> str:
    """Whom an address stands for: itself, of IPv6 its /64; what is no address stands for itself."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # a socket in the file system has none
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        prefix = int(found) >> (128 - _IPV6_NETWORK) << (128 - _IPV6_NETWORK)
        return f"{ipaddress.IPv6Address(prefix)}/{_IPV6_NETWORK}"
    return str(found)
