"""What others on the machine cost, and what HTTP does.

    python -m benchmarks.contention
    python -m benchmarks.contention --rounds 1 --max-tokens 32

* Speed beside a process that never sleeps on one core, over the speed without it, in turns; on the
  native kernels and in plain torch.
* What lies between the engine's step and the client's socket: the time between two tokens over
  HTTP, less that of the same engine in process, in turns; for each token of the step. Both while
  nobody's prompt is read, which in process is seen to; in brackets over the whole run.
* How even the tokens come with 32 streams: the 95th percentile of the gaps over their median, in
  the same two ways.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import servers
from benchmarks.inside import Inside
from benchmarks.load import HELLO, Level, Server, ask, measure
from benchmarks.machine import busy_core, machine, model_folder, today
from benchmarks.pages import table, write_block

WORDS = 16
PATHS = {
    "native kernels": {"NATIVE_KERNELS": "true"},
    "plain torch": {"NATIVE_KERNELS": "false"},
}


@contextlib.contextmanager
def served(options: argparse.Namespace, environment: dict[str, str]) -> Iterator[Server]:
    """Our server, warm."""
    contender = servers.ours(options.folder, options.scratch, **environment)
    with tempfile.TemporaryFile() as log, servers.running(contender, log) as running:
        asyncio.run(ask(running.server, HELLO, options.max_tokens))
        yield running.server


def level(server: Server, streams: int, options: argparse.Namespace, seed: int) -> Level:
    """So many answers at once."""
    length = {"words": WORDS, "max_tokens": options.max_tokens, "seed": seed}
    return asyncio.run(measure(server, streams, streams, **length))


def contention(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the first table."""
    for name in options.paths:
        with served(options, PATHS[name]) as server:
            for streams in options.busy_streams:
                pairs = []
                for number in range(options.rounds):
                    seed = 2 * number
                    quiet = level(server, streams, options, seed).tokens_per_s
                    with busy_core():
                        busy = level(server, streams, options, seed + 1).tokens_per_s
                    pairs.append((quiet, busy))
                quiet, busy = (statistics.median(column) for column in zip(*pairs, strict=True))
                share = statistics.median(after / before for before, after in pairs)
                cells = [f"{quiet:.0f}", f"{busy:.0f}", f"{100 * share:.0f} %", "40 %"]
                yield [f"{name}, {streams} stream{'s' if streams > 1 else ''}", *cells]


def to_the_socket(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the second table."""
    inside = Inside(options.folder, NATIVE_KERNELS="true")
    try:
        with served(options, PATHS["native kernels"]) as server:
            for streams in options.streams:
                yield socket_row(inside, server, streams, options)
    finally:
        inside.close()


def socket_row(
    inside: Inside, server: Server, streams: int, options: argparse.Namespace
) -> list[str]:
    """One number of streams."""
    inside.step_ms(streams, 8)
    level(server, streams, options, 99)  # nobody's first time counts
    steps, levels = [], []
    for number in range(options.rounds):
        steps.append(inside.step_ms(streams, options.max_tokens))
        levels.append(level(server, streams, options, 100 + number))
    step = statistics.median(steps)
    steady = [(each.steady_ms, each.steady_p95_ms) for each in levels]
    whole = [(each.gap_ms, each.gap_p95_ms) for each in levels]
    cells = []
    for gaps in (steady, whole):
        gap = statistics.median(median for median, _ in gaps)
        cost = statistics.median(
            1000 * (median - before) / streams
            for (median, _), before in zip(gaps, steps, strict=True)
        )
        tail = statistics.median(p95 / median for median, p95 in gaps)
        cells.append(
            (f"{gap:.2f}", f"{cost:.0f}", f"{100 * (gap / step - 1):+.1f} %", f"{tail:.2f}")
        )
    return [
        f"{streams}",
        f"{step:.2f}",
        *(f"{one} ({two})" for one, two in zip(*cells, strict=True)),
    ]


def main() -> None:
    """Measure and print both tables."""
    numbers = {"type": lambda text: [int(part) for part in text.split(",") if part]}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--paths", nargs="*", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--busy-streams", default=[1, 8], **numbers)
    parser.add_argument("--streams", default=[1, 8, 32], **numbers)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--write", type=Path, help="a page to write into")
    options = parser.parse_args()
    servers.end_on_signals()
    options.scratch = options.scratch.absolute()
    options.scratch.mkdir(parents=True, exist_ok=True)
    options.folder = model_folder(options.model, options.scratch)
    parts = []
    heads = [
        "one other process on one core",
        "quiet, tokens/s",
        "busy",
        "busy / quiet",
        "asked for",
    ]
    parts.append(printed(table(heads, told(contention(options)))))
    heads = ["streams", "step in process, ms", "between tokens over HTTP, ms", "µs per token"]
    heads += ["more than the step", "p95 / median gap"]
    parts.append(printed(table(heads, told(to_the_socket(options)))))
    parts.append(
        printed(
            "While nobody's prompt is read; in brackets over the whole run, with the reading of "
            "prompts at its start. Asked for: 100 µs or 5 % of a step between step and socket; "
            f"with 32 streams a gap p95 of at most 1.5 medians. {today()}, {options.model}: "
            f"medians of {options.rounds} rounds. {machine()}."
        )
    )
    if options.write:
        write_block(options.write, "contention", "\n\n".join(parts))


def told(rows: Iterable[list[str]]) -> list[list[str]]:
    """The same rows, each shown when it is there."""
    known = []
    for row in rows:
        known.append(row)
        print(" | ".join(row), file=sys.stderr, flush=True)
    return known


def printed(text: str) -> str:
    """The same, shown at once."""
    print(f"{text}\n", flush=True)
    return text


if __name__ == "__main__":
    main()
