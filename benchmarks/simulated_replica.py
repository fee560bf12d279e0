"""A replica without a model, for simulations: one resident, up to 32 answers of it at once.

Its times are those of decode steps: ``step`` seconds, and ``row`` more for each running answer,
as measured. Another model is loaded where requests for it have waited for a turn, once the
resident's answers have ended.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

SLOTS = 32  # answers at once, of one model
TOKENS = 64  # of an answer
PREFILL = 5  # steps until the first token
TURN_S = 2.0  # how long others may wait for the resident model's requests


class Clock:
    """Events in the order of their times; nobody waits for them."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[[float], None]) -> None:
        """Call ``what`` with the time, once it is ``when``."""
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def run(self) -> None:
        """Run until nothing is left."""
        while self._events:
            when, _, what = heapq.heappop(self._events)
            what(when)


@dataclass(frozen=True, slots=True)
class Request:
    """A request for a model, and when it came."""

    model: int
    came: float


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a load, of a step of one answer, and of each further answer in a step."""

    load: float
    step: float
    row: float


@dataclass(slots=True, eq=False)
class Replica:
    """One engine on ``clock``. ``note`` is told the seconds to each first token."""

    clock: Clock
    times: Times
    note: Callable[[float], None]
    resident: int | None = None
    waiting: deque[Request] = field(default_factory=deque)
    running: int = 0
    loads: int = 0
    _busy_until: float = 0.0  # of a load
    _steps: int = 0
    _is_stepping: bool = False
    _firsts: deque[tuple[int, Request]] = field(default_factory=deque)  # by the step they come in
    _ends: deque[int] = field(default_factory=deque)

    @property
    def work(self) -> int:
        """Requests that are there."""
        return self.running + len(self.waiting)

    def take(self, request: Request, now: float) -> None:
        """Take a request."""
        self.waiting.append(request)
        self._begin(now)

    def _begin(self, now: float) -> None:
        while (request := self._next(now)) is not None:
            if request.model != self.resident:
                self.resident = request.model
                self.loads += 1
                self._busy_until = now + self.times.load
            self.running += 1
            self._firsts.append((self._steps + PREFILL, request))
            self._ends.append(self._steps + PREFILL + TOKENS)
        if self.running and not self._is_stepping:
            self._is_stepping = True
            self._go_on(max(now, self._busy_until))

    def _next(self, now: float) -> Request | None:
        """The request that begins now: of the resident model, while nobody waits for too long."""
        if not self.waiting or self.running >= SLOTS:
            return None
        oldest = self.waiting[0]
        own = next((each for each in self.waiting if each.model == self.resident), None)
        if own is not None and (own is oldest or now - oldest.came < TURN_S):
            self.waiting.remove(own)
            return own
        if self.running:
            return None  # it drains
        self.waiting.popleft()
        return oldest

    def _go_on(self, now: float) -> None:
        self.clock.at(now + self.times.step + self.times.row * (self.running - 1), self._step)

    def _step(self, now: float) -> None:
        self._steps += 1
        while self._firsts and self._firsts[0][0] <= self._steps:
            self.note(now - self._firsts.popleft()[1].came)
        while self._ends and self._ends[0] <= self._steps:
            self._ends.popleft()
            self.running -= 1
        self._is_stepping = self.running > 0
        if self._is_stepping:
            self._begin(now)
            self._go_on(now)
        else:
            self._begin(now)
