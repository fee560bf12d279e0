"""Admission: how many requests at once, for how long, and the refusal of those that are too many.

Every request that leases a model, or waits for one, is in here from its arrival to its last byte.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from transformers_api.errors import ApiError, DeadlineExceeded, Overloaded
from transformers_api.serving.limits.cancellation import Cancellation

WINDOW_S = 60.0  # how far back the rate of finished requests is looked at
MOST_S = 120  # clients give up on a Retry-After beyond
DEADLINE = "The answer was not complete after {:g} s"


class Throughput:
    """The recent rate of finished requests. Not safe from several threads by itself.

    Time without any request says nothing about that, and does not pass in here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=1024)
        self._started = self._idle_since = clock()
        self._is_idle = True
        self._idle_s = 0.0

    def began(self) -> None:
        """A request has come, and maybe there was none before."""
        if self._is_idle:
            self._idle_s += self._clock() - self._idle_since
            self._is_idle = False

    def ended(self, left: int) -> None:
        """A request has finished, and ``left`` others have not."""
        self._ends.append(self._busy_s())
        if not left:
            self._is_idle, self._idle_since = True, self._clock()

    def wait_s(self, ahead: int) -> int:
        """Whole seconds until ``ahead`` more will have finished at this rate: 1 to 120."""
        busy_s = self._busy_s()
        while self._ends and self._ends[0] < busy_s - WINDOW_S:
            self._ends.popleft()
        # Where nothing has finished yet, nothing is promised before it has taken that long again.
        estimate = ahead * min(busy_s, WINDOW_S) / max(len(self._ends), 1)
        return min(max(math.ceil(estimate), 1), MOST_S)

    def _busy_s(self) -> float:
        return self._clock() - self._started - self._idle_s


class Admission:
    """The places for requests. ``slots`` of them are worked on, the others wait.

    ``timeout_s``: a request that is not finished then is cancelled with DeadlineExceeded.
    Safe from any thread; the one that keeps the deadlines starts with the first request.
    """

    def __init__(
        self,
        slots: int,
        waiting: int,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._places = slots + waiting
        self._timeout_s = timeout_s
        self._clock = clock
        self._condition = threading.Condition()
        self._live: set[Cancellation] = set()
        self._due: dict[Cancellation, float] = {}  # when each is to end, the earliest first
        self._throughput = Throughput(clock)
        self._keeper: threading.Thread | None = None
        self._others: list[Callable[[ApiError], None]] = []

    def __len__(self) -> int:
        """Requests that are in here."""
        return len(self._live)

    @property
    def slots(self) -> int:
        """Requests that are worked on at once."""
        return self._slots

    @property
    def waiting(self) -> int:
        """Requests that may wait beside these."""
        return self._places - self._slots

    def resize(self, slots: int, waiting: int) -> None:
        """Have so many places from now on; whoever is in here stays."""
        with self._condition:
            self._slots, self._places = slots, slots + waiting

    def enter(self, cancellation: Cancellation) -> None:
        """Take a place. Raises Overloaded."""
        with self._condition:
            if len(self._live) >= self._places:
                raise Overloaded("Too many requests are waiting", retry_after=self._retry_after())
            if self._timeout_s is not None:
                self._start_keeper()  # which may fail, before anything is taken
                self._due[cancellation] = self._clock() + self._timeout_s
                if len(self._due) == 1:  # it waits for the first
                    self._condition.notify()
            self._throughput.began()
            self._live.add(cancellation)

    def leave(self, cancellation: Cancellation) -> None:
        """Give the place back. Idempotent."""
        with self._condition:
            self._due.pop(cancellation, None)
            if cancellation in self._live:
                self._live.remove(cancellation)
                self._throughput.ended(len(self._live))

    def retry_after(self) -> int:
        """Seconds until those who wait now will have had their turn, as far as one can tell."""
        with self._condition:
            return self._retry_after()

    def end_after(self, grace_s: float, error: ApiError) -> None:
        """Cancel what still runs after ``grace_s`` seconds, with ``error``; returns at once."""
        timer = threading.Timer(max(grace_s, 0.0), self.end_all, args=(error,))
        timer.daemon = True
        timer.start()

    def on_end(self, end: Callable[[ApiError], None]) -> None:
        """Have ``end`` called as well where every request is cancelled: for what outlives them."""
        self._others.append(end)

    def end_all(self, error: ApiError) -> None:
        """Cancel every request with ``error``."""
        for end in self._others:
            end(error)
        with self._condition:
            live = list(self._live)
        for cancellation in live:
            cancellation.cancel(error)

    def _retry_after(self) -> int:
        return self._throughput.wait_s(max(len(self._live) - self._slots, 1))

    def _start_keeper(self) -> None:
        if self._keeper is None:
            keeper = threading.Thread(target=self._keep, name="deadlines", daemon=True)
            keeper.start()
            self._keeper = keeper

    def _keep(self) -> None:
        while True:
            for cancellation in self._overdue():
                cancellation.cancel(DeadlineExceeded(DEADLINE.format(self._timeout_s)))

    def _overdue(self) -> list[Cancellation]:
        """Wait for the next deadline; whoever has missed it keeps the place until it has ended."""
        with self._condition:
            left_s = next(iter(self._due.values()), math.inf) - self._clock()
            if left_s > 0:
                self._condition.wait(None if left_s == math.inf else left_s)
            now = self._clock()
            overdue = [cancellation for cancellation, due in self._due.items() if due <= now]
            for cancellation in overdue:
                del self._due[cancellation]
            return overdue
