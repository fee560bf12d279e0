"""Routing of requests to replicas, simulated: `python -m benchmarks.routing`.

Requests come at random (Poisson) for models of a Zipf popularity. Times are what was measured of
the default model. A replica is chosen at random, by the model's hash, or by residency, with the
very rule of `cluster` (``transformers_api.cluster.routing``): ``--spread`` are the requests of all
that have a hot model above which another replica takes it, too. With ``--own`` the most popular
model has so many replicas of its own. No clock is waited for: ten minutes of sixteen replicas
take seconds.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass

from benchmarks.simulated_replica import SLOTS, Clock, Replica, Request, Times
from transformers_api.cluster.routing import ranks

COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Load:
    """``rate`` requests a second in all, for models of popularity rank ** -``skew``.

    ``own``: replicas that have the most popular model alone.
    """

    models: int
    skew: float
    rate: float
    seconds: float
    own: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds to the first token, swaps per minute and replica, models held twice at the end."""

    median: float
    late: float  # the 95th percentile
    swaps: float
    copies: float  # replicas that had the most popular model, on average


def choose(
    route: str, spread: int, replicas: list[Replica], model: int, chance: random.Random
) -> Replica:
    """The replica of a request."""
    if route == "random":
        return chance.choice(replicas)
    if route == "hash":
        return replicas[model * 2_654_435_761 % 2**32 % len(replicas)]
    order = ranks(
        replicas,
        spread,
        holds=lambda each: each.resident == model,
        is_empty=lambda each: each.resident is None,
        work=lambda each: each.work,
    )
    return next(
        (each for group in order for each in group if each.work < 2 * SLOTS),  # else it is full
        order[0][0],
    )


def simulate(route: str, spread: int, count: int, load: Load, times: Times) -> Outcome:
    """Run ``load`` on ``count`` replicas."""
    chance, clock, firsts = random.Random(0), Clock(), list[float]()
    weights = [(rank + 1) ** -load.skew for rank in range(load.models)]
    replicas = [Replica(clock, times, firsts.append) for _ in range(count)]
    copies: list[int] = []

    def arrive(now: float) -> None:
        model = chance.choices(range(load.models), weights)[0]
        pool = replicas[load.own :] if model else replicas[: load.own] or replicas
        choose(route, spread, pool, model, chance).take(Request(model, now), now)
        copies.append(sum(each.resident == 0 for each in replicas))
        if now < load.seconds:
            clock.at(now + chance.expovariate(load.rate), arrive)

    clock.at(0.0, arrive)
    clock.run()
    loads = sum(each.loads for each in replicas)
    return Outcome(
        statistics.median(firsts),
        statistics.quantiles(firsts, n=20)[-1],
        loads / load.seconds * 60 / count,
        statistics.mean(copies),
    )


def main() -> None:
    """Print a table for docs/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--skew", type=float, default=1.0, help="of popularity, by Zipf's law")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second per replica")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--step", type=float, default=0.009, help="seconds of a decode step")
    parser.add_argument("--row", type=float, default=0.0015, help="of each answer more in a step")
    parser.add_argument("--load", type=float, default=0.65, help="seconds of a load")
    parser.add_argument("--own", type=int, default=0, help="replicas of the first model alone")
    parser.add_argument("--replicas", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--spread", type=int, nargs="*", default=[])
    options = parser.parse_args()
    times = Times(options.load, options.step, options.row)
    routes = [("residency", spread) for spread in options.spread]
    print("| replicas | routed by | first token, s (median / p95) | swaps | first model in |")
    print("| --- | --- | --- | --- | --- |")
    for count in options.replicas:
        load = Load(
            options.models, options.skew, options.rate * count, options.seconds, options.own
        )
        for route, spread in routes or [("random", 0), ("hash", 0), ("residency", SLOTS)]:
            outcome = simulate(route, spread, count, load, times)
            name = f"{route}, {spread}" if routes else route
            print(
                f"| {count} | {name} | {outcome.median:.2f} / {outcome.late:.2f} "
                f"| {outcome.swaps:.1f} | {outcome.copies:.1f} |"
            )


if __name__ == "__main__":
    main()
