"""The pace of an upstream: how much of the one thread that reads from all it may have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SHARE = 0.2  # of a core, for all answers of one upstream: 4,000 tokens a second, one by one
BURST_S = 0.05  # of that thread, before it waits
SLICE_S = 0.001  # after which others have their turn
PART_S = 20e-6  # what a part of an answer costs before it comes here


class Pace:
    """Seconds of the thread that one upstream has used, given back as time goes by.

    Whoever has none left is not read from for a while; its connection fills, and it has to wait.
    Of one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left_s, self._at = BURST_S, clock()

    def spend(self, seconds: float) -> float:
        """Take ``seconds``; the time to wait before any more are."""
        now = self._clock()
        self._left_s = min(self._left_s + (now - self._at) * SHARE, BURST_S) - seconds
        self._at = now
        return max(-self._left_s / SHARE, 0.0)

    async def rest(self, seconds: float) -> None:
        """Take ``seconds``, and let others have their turn, for as long as that asks for."""
        await asyncio.sleep(self.spend(seconds))


class Turn:
    """The use of the thread by one answer, from one look at the clock to the next."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._began = time.thread_time()

    def begin(self) -> None:
        """A part of the answer has come."""
        self._began = time.thread_time() - PART_S

    @property
    def is_over(self) -> bool:
        """True once others should have theirs."""
        return time.thread_time() - self._began > SLICE_S

    async def end(self) -> None:
        """Wait as long as the pace asks for."""
        used_s = time.thread_time() - self._began
        await self._pace.rest(used_s)
        self._began = time.thread_time()
