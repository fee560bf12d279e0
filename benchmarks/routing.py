"""Routing of requests to replicas, simulated: `python -m benchmarks.routing`.

Requests come at random (Poisson) for models of a Zipf popularity. Each replica has one model in
memory and decodes up to 32 answers of it at once; it loads another where requests for that have
waited for a turn, once its answers have ended. Times are what was measured of the default model
(``--step``, ``--load``). Three ways to choose a replica: at random, by the model's hash, and by
residency, as Ray Serve does for `cluster`: one that has the model and room, else the one with the
least to do. No clock is waited for: an hour takes seconds.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

SLOTS = 32  # answers at once, of one model
TOKENS = 64  # of an answer
PREFILL = 5  # steps until the first token
TURN_S = 2.0  # how long others may wait for the resident model's requests
ROUTES = ("random", "hash", "residency")


@dataclass(slots=True)
class Request:
    """A request for a model, and when it came."""

    model: int
    came: float


@dataclass(slots=True)
class Replica:
    """One engine. ``busy_until``: of a load."""

    resident: int | None = None
    running: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    busy_until: float = 0.0
    loads: int = 0

    @property
    def work(self) -> int:
        """Requests that are there."""
        return self.running + len(self.waiting)

    def next_request(self, now: float) -> Request | None:
        """The request that begins now: of the resident model, while nobody waits for too long."""
        if self.busy_until > now or not self.waiting or self.running >= SLOTS:
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds to the first token, and swaps of all replicas per minute."""

    median: float
    late: float  # the 95th percentile
    swaps: float


def choose(route: str, replicas: list[Replica], model: int, chance: random.Random) -> Replica:
    """The replica of a request."""
    if route == "random":
        return chance.choice(replicas)
    if route == "hash":
        return replicas[model * 2_654_435_761 % 2**32 % len(replicas)]
    holders = [each for each in replicas if each.resident == model and each.work < SLOTS]
    idle = [each for each in replicas if each.resident is None]
    return min(holders or idle or replicas, key=lambda each: each.work)


def simulate(
    route: str, count: int, models: int, rate: float, seconds: float, step: float, load: float
) -> Outcome:
    """Run ``seconds`` of ``rate`` requests a second on ``count`` replicas."""
    chance = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(models)]
    replicas = [Replica() for _ in range(count)]
    events: list[tuple[float, int, Callable[[float], None]]] = []
    numbers = itertools.count()
    first_tokens: list[float] = []

    def at(when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (when, next(numbers), what))

    def begin(replica: Replica, now: float) -> None:
        while (request := replica.next_request(now)) is not None:
            start = now
            if request.model != replica.resident:
                replica.resident = request.model
                replica.loads += 1
                start = replica.busy_until = now + load
                at(start, lambda when, own=replica: begin(own, when))
            replica.running += 1
            first_tokens.append(start + PREFILL * step - request.came)
            at(start + (PREFILL + TOKENS) * step, lambda when, own=replica: end(own, when))
        if replica.waiting and not replica.running and replica.busy_until <= now:
            raise AssertionError("an idle replica leaves requests waiting")

    def end(replica: Replica, now: float) -> None:
        replica.running -= 1
        begin(replica, now)

    def arrive(now: float) -> None:
        model = chance.choices(range(models), weights)[0]
        replica = choose(route, replicas, model, chance)
        replica.waiting.append(Request(model, now))
        begin(replica, now)
        if now < seconds:
            at(now + chance.expovariate(rate), arrive)

    at(0.0, arrive)
    while events:
        when, _, what = heapq.heappop(events)
        what(when)
    cuts = statistics.quantiles(first_tokens, n=20)
    swaps = sum(each.loads for each in replicas) / seconds * 60
    return Outcome(statistics.median(first_tokens), cuts[-1], swaps)


def main() -> None:
    """Print a table for docs/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second per replica")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--step", type=float, default=0.02, help="seconds of a decode step")
    parser.add_argument("--load", type=float, default=0.65, help="seconds of a load")
    options = parser.parse_args()
    print("| replicas | routed by | first token, s (median / p95) | swaps per minute and replica |")
    print("| --- | --- | --- | --- |")
    for count in (1, 2, 4, 8, 16):
        for route in ROUTES if count > 1 else ROUTES[-1:]:
            outcome = simulate(
                *(route, count, options.models, options.rate * count),
                *(options.seconds, options.step, options.load),
            )
            print(
                f"| {count} | {route} | {outcome.median:.2f} / {outcome.late:.2f} "
                f"| {outcome.swaps / count:.1f} |"
            )


if __name__ == "__main__":
    main()
