"""The cost of holding answers to a form.

    python -m benchmarks.constraints
    python -m benchmarks.constraints --rounds 3 --write docs/performance.md

In process, with the default model at temperature 1: steps of free and of constrained answers of the
same length, in turns; the processor's time of all threads for a token more; the gaps of a free
answer beside constrained ones; and the time from a schema to its first mask, new and known. The
constrained answers are lists of objects that a schema describes, so long that they do not end.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.inside import Inside
from benchmarks.machine import default_model_folder, machine, today
from benchmarks.pages import table, write_block
from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenConstraint
from transformers_api.serving.constraints.json_schema import json_constraint

TRIP = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "unit": {"enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": TRIP, "minItems": 1000}


def schema(number: int) -> dict[str, object]:
    """One that nobody has compiled."""
    return {**TRIP, "properties": {**TRIP["properties"], f"field_{number}": {"type": "number"}}}  # type: ignore[dict-item]


class Bench:
    """One model, and what is asked of it."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.inside = Inside(folder)
        self.model = self.inside.loaded
        self.tokens = tokens
        self._seed = 0
        self.grammar = self.model.compiler.compile(json_constraint(ENDLESS, "schema"))

    def run(self, kinds: Sequence[bool]) -> tuple[list[list[float]], float]:
        """Moments of the tokens of one answer for each of ``kinds`` (constrained or not).

        And the processor's time of this process, in seconds.
        """
        params = [
            SamplingParams(
                max_tokens=self.tokens, temperature=1.0, ignore_eos=True, seed=self.seed()
            )
            for _ in kinds
        ]
        limits: list[TokenConstraint | None] = [self.grammar.start() if k else None for k in kinds]
        requests = [
            SequenceRequest(self.inside.prompt(), p, constraint)
            for p, constraint in zip(params, limits, strict=True)
        ]
        moments: list[list[float]] = [[] for _ in kinds]
        began = time.process_time()
        for output in self.model.engine.submit(requests).read():
            assert output is not None
            assert output.error is None, output.error
            moments[output.index].append(time.perf_counter())
        return moments, time.process_time() - began

    def seed(self) -> int:
        """Another one each time."""
        self._seed += 1
        return self._seed


def step_ms(moments: list[list[float]]) -> float:
    """The mean gap of the last answer to begin: nobody's prompt is read any more then.

    Not the median: what is read ahead comes in one moment.
    """
    last = moments[-1]
    return 1000 * (last[-1] - last[0]) / (len(last) - 1)


def speeds(bench: Bench, rounds: int) -> Iterator[list[str]]:
    """Lines of the first table."""
    for streams in (1, 8, 32):
        pairs, costs = [], []
        for turn in range(rounds + 1):
            free, free_s = bench.run([False] * streams)
            bound, bound_s = bench.run([True] * streams)
            if turn:  # the first warms up
                pairs.append((step_ms(free), step_ms(bound)))
                costs.append((bound_s - free_s) / (streams * bench.tokens))
        free_ms, bound_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        cost = 1e6 * statistics.median(costs)
        yield [
            str(streams),
            f"{1000 * streams / free_ms:.0f}",
            f"{1000 * streams / bound_ms:.0f}",
            f"{ratio:.2f}",
            f"{cost:.0f}",
        ]


def neighbour(bench: Bench, rounds: int) -> float:
    """The 95th percentile of a free answer's gaps beside 31 constrained ones, over beside free."""
    ratios = []
    for _ in range(rounds):
        tails = []
        for bound in (False, True):
            moments, _ = bench.run([bound] * 31 + [False])
            gaps = [after - before for before, after in itertools.pairwise(moments[-1])]
            tails.append(statistics.quantiles(gaps, n=20)[-1])
        ratios.append(tails[1] / tails[0])
    return statistics.median(ratios)


def compiles(bench: Bench, count: int) -> tuple[float, float, float]:
    """Milliseconds from a schema to its first mask: median and p95 of new ones, median of known."""
    new, known = [], []
    for number in range(count):
        for times in (new, known):
            began = time.perf_counter()
            bench.model.compiler.compile(json_constraint(schema(number), "schema")).start()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(new), statistics.quantiles(new, n=20)[-1], statistics.median(known)


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--write", type=Path, help="a page with the block `constraints`")
    options = parser.parse_args()
    bench = Bench(default_model_folder(), options.tokens)
    heads = (
        "streams",
        "free, tokens/s",
        "constrained, tokens/s",
        "ratio",
        "µs of processor a token more",
    )
    lines = table(heads, speeds(bench, options.rounds))
    tail = neighbour(bench, options.rounds)
    new, worst, known = compiles(bench, options.schemas)
    bench.inside.close()
    text = (
        f"{lines}\n\nA free answer beside 31 constrained ones: the 95th percentile of its gaps is "
        f"{tail:.2f} times that beside free ones. A new schema takes {new:.1f} ms to its first "
        f"mask (95 % within {worst:.1f} ms), a known one {known:.2f} ms.\n\n"
        f"{today()}, `python -m benchmarks.constraints --rounds {options.rounds}`: medians of "
        f"{options.rounds} rounds. {machine()}."
    )
    print(text)
    if options.write:
        write_block(options.write, "constraints", text)


if __name__ == "__main__":
    main()
