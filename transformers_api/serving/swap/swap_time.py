"""Seconds of loading that each client may still cause: what it makes others wait it pays for.

An account fills by the clock. With enough on it a client has its model without the patience that
all others need; who has spent more than came in waits until that is made up for. No threads or
clock.
"""

from __future__ import annotations

import math

RATE = 0.1  # seconds of loading that a second earns
MOST_S = 1.0  # that an account holds, and what a new client has; as much may be owed
MOST_ACCOUNTS = 4096


class SwapTime:
    """The accounts of clients. An empty name stands for one that is not known, and has none."""

    def __init__(self) -> None:
        self._accounts: dict[str, tuple[float, float]] = {}  # (seconds, when they were so many)

    def charge(self, client: str, seconds: float, now: float) -> None:
        """Take what a load took off the account."""
        if client:
            left = max(self._balance(client, now) - seconds, -MOST_S)
            self._accounts.pop(client, None)
            self._accounts[client] = left, now
            if len(self._accounts) > MOST_ACCOUNTS:  # the oldest has long been full again
                del self._accounts[next(iter(self._accounts))]

    def affordable_at(self, client: str, seconds: float) -> float:
        """From when on a load of so many seconds can be paid; infinite for unknown clients.

        One of more than an account holds takes all that is on a full one.
        """
        if not client:
            return math.inf
        return self._reaches(client, min(seconds, MOST_S))

    def settled_at(self, client: str) -> float:
        """From when on nothing is owed."""
        return self._reaches(client, 0.0) if client else -math.inf

    def _balance(self, client: str, now: float) -> float:
        seconds, then = self._accounts.get(client, (MOST_S, now))
        return min(seconds + (now - then) * RATE, MOST_S)

    def _reaches(self, client: str, level: float) -> float:
        seconds, then = self._accounts.get(client, (MOST_S, -math.inf))
        return then if seconds >= level else then + (level - seconds) / RATE
