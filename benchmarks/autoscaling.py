"""Replicas of one model that come and go, simulated: `python -m benchmarks.autoscaling`.

A model with `replicas: {min, max}` gets few requests, then for ten minutes as many as several
replicas take, then few again. Serve's rule: as many replicas as the requests in flight on average
of the last 30 s are for, at ``--target`` each; more after ``--up`` seconds of that, fewer after
ten minutes; a new one takes ``--start`` seconds, its load among them.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, field

from benchmarks.simulated_replica import SLOTS, Clock, Replica, Request, Times

LOOK_BACK_S = 30.0
DOWN_S = 600.0
CALM_S, SURGE_S = 300.0, 600.0
LOOK_S = 1.0


@dataclass(slots=True)
class Scaler:
    """Serve's autoscaling of one deployment."""

    least: int
    most: int
    target: float
    up_s: float
    wanting_since: float | None = None  # and in which direction
    direction: int = 0
    seen: deque[int] = field(default_factory=lambda: deque(maxlen=int(LOOK_BACK_S / LOOK_S)))

    def replicas(self, now: float, in_flight: int, running: int) -> int:
        """The replicas that there are to be."""
        self.seen.append(in_flight)
        desired = math.ceil(statistics.mean(self.seen) / self.target)
        desired = min(max(desired, self.least), self.most)
        direction = (desired > running) - (desired < running)
        if direction != self.direction:
            self.direction, self.wanting_since = direction, now
        delay_s = self.up_s if direction > 0 else DOWN_S
        if direction and self.wanting_since is not None and now - self.wanting_since >= delay_s:
            self.wanting_since = now
            return desired
        return running


def simulate(
    scaler: Scaler, times: Times, calm: float, surge: float, start_s: float
) -> tuple[list[float], float]:
    """(seconds to the first token of those that came in the surge, replica-minutes)."""
    chance, clock = random.Random(0), Clock()
    firsts: list[float] = []
    late: list[float] = []
    end_s = CALM_S + SURGE_S + CALM_S + DOWN_S
    replicas = [Replica(clock, times, firsts.append, resident=0) for _ in range(scaler.least)]
    starting = 0
    minutes = 0.0

    def add(_: float) -> None:
        nonlocal starting
        starting -= 1
        replicas.append(Replica(clock, times, firsts.append, resident=0))

    def look(now: float) -> None:
        nonlocal starting, minutes
        running = len(replicas) + starting
        minutes += running * LOOK_S / 60
        count = scaler.replicas(now, sum(each.work for each in replicas), running)
        for _ in range(count - running):
            starting += 1
            clock.at(now + start_s, add)
        for _ in range(running - count):  # the emptiest one drains
            replicas.remove(min(replicas, key=lambda each: each.work))
        if now < end_s:
            clock.at(now + LOOK_S, look)

    def arrive(now: float) -> None:
        is_surge = CALM_S <= now < CALM_S + SURGE_S
        replica = min(replicas, key=lambda each: each.work)
        replica.note = late.append if is_surge else firsts.append
        replica.take(Request(0, now), now)
        if now < end_s:
            clock.at(now + chance.expovariate(surge if is_surge else calm), arrive)

    clock.at(0.0, look)
    clock.at(0.0, arrive)
    clock.run()
    return late, minutes


def main() -> None:
    """Print a table for docs/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calm", type=float, default=1.0, help="requests a second")
    parser.add_argument("--surge", type=float, default=24.0, help="requests a second")
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--start", type=float, default=10.0)
    parser.add_argument("--up", type=float, nargs="*", default=[5.0, 30.0])
    parser.add_argument("--target", type=int, nargs="*", default=[8, 16, 24, 32])
    parser.add_argument("--step", type=float, default=0.009, help="seconds of a decode step")
    parser.add_argument("--row", type=float, default=0.0015, help="of each answer more in a step")
    options = parser.parse_args()
    times = Times(0.0, options.step, options.row)
    print(f"| target of {SLOTS} | up after, s | first token in the surge, s | replica-minutes |")
    print("| --- | --- | --- | --- |")
    for up_s in options.up:
        for target in options.target:
            scaler = Scaler(1, options.most, target, up_s)
            firsts, minutes = simulate(scaler, times, options.calm, options.surge, options.start)
            median, late = statistics.median(firsts), statistics.quantiles(firsts, n=20)[-1]
            print(f"| {target} | {up_s:g} | {median:.2f} / {late:.2f} | {minutes:.0f} |")


if __name__ == "__main__":
    main()
