"""The places for requests that are traced: how many at once, and who waits for one."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from transformers_api.errors import TraceBusy
from transformers_api.serving.limits.admission import Throughput
from transformers_api.serving.limits.cancellation import Cancellation

WHOLE, LIGHT = 8, 1  # eighths of a place; see trace_plan.cost


class TraceSlots:
    """The number of requests that are traced at once. From any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._condition = threading.Condition()
        self._line: deque[object] = deque()  # first come, first served
        self._taken = 0  # eighths
        self._running = 0
        self._throughput = Throughput(clock)

    def __len__(self) -> int:
        """Requests that wait for a place."""
        return len(self._line)

    def take(
        self,
        most: int,
        cost: int = WHOLE,
        *,
        waiting: int = 0,
        cancellation: Cancellation | None = None,
    ) -> Callable[[], None]:
        """Take ``cost`` eighths of one of ``most`` places, as soon as they are free.

        What comes back gives them back, once however often called. Raises TraceBusy where
        ``waiting`` others wait already, and the reason of ``cancellation``.
        """
        with self._condition:
            if self._line or not self._fits(most, cost):
                if len(self._line) >= waiting:
                    raise TraceBusy(
                        f"As many requests are being traced as may be at once ({most})",
                        retry_after=self._throughput.wait_s(len(self._line) + 1),
                    )
                self._wait(most, cost, cancellation or Cancellation())
            self._throughput.began()
            self._taken += cost
            self._running += 1
        return _Place(lambda: self._give_back(cost))

    def _fits(self, most: int, cost: int) -> bool:
        return self._taken + cost <= most * WHOLE

    def _wait(self, most: int, cost: int, cancellation: Cancellation) -> None:
        ticket = object()
        self._line.append(ticket)
        cancellation.on_cancel(self._wake)
        try:
            self._condition.wait_for(
                lambda: (
                    cancellation.is_cancelled
                    or (self._line[0] is ticket and self._fits(most, cost))
                )
            )
            cancellation.check()
        finally:
            self._line.remove(ticket)
            self._condition.notify_all()  # the next one may fit, too

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _give_back(self, cost: int) -> None:
        with self._condition:
            self._taken -= cost
            self._running -= 1
            self._throughput.ended(self._running)
            self._condition.notify_all()


class _Place:
    """Calls ``end`` at its first call and never again."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._ends = [end]

    def __call__(self) -> None:
        try:
            end = self._ends.pop()  # atomic: of two threads one gets it
        except IndexError:
            return
        end()
