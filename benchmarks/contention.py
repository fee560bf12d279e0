"""What others on the machine cost, and what HTTP does.

    python -m benchmarks.contention
    python -m benchmarks.contention --rounds 1 --max-tokens 32

* Speed beside a process that never sleeps on one core, over the speed without it, in turns; on the
  native kernels and in plain torch.
* What a step of the engine takes in process, and while the same engine serves over HTTP, in many
  short turns; both while nobody's prompt is read. The client takes its time from the same cores.
* What HTTP, JSON, SSE and detokenising cost for each token: the processor's time of all threads of
  the server but those that compute, from longer answers less shorter ones, the rest of which is
  what a request costs; and the time from the end of a step until the last of its tokens has come
  to its client, over their number. This one includes what the client does.
* How even the tokens come with 32 streams: the 95th percentile of the gaps over their median,
  while nobody's prompt is read and, in brackets, over the whole run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import servers
from benchmarks.inside import Inside
from benchmarks.load import HELLO, Answer, Level, Run, Server, ask, run
from benchmarks.machine import busy_core, machine, model_folder, today
from benchmarks.pages import table, write_block
from benchmarks.stamped import steps

WORDS = 16
FEW = 8  # tokens, of answers that show what a request costs
PATHS = {
    "native kernels": {"NATIVE_KERNELS": "true"},
    "plain torch": {"NATIVE_KERNELS": "false"},
}


@contextlib.contextmanager
def served(
    options: argparse.Namespace, environment: dict[str, str], stamps: Path | None = None
) -> Iterator[servers.Running]:
    """Our server, warm; it notes its steps in ``stamps``."""
    contender = servers.ours(options.folder, options.scratch, **environment)
    if stamps:
        contender = servers.stamped(contender, stamps)
    with tempfile.TemporaryFile() as log, servers.running(contender, log) as running:
        asyncio.run(ask(running.server, HELLO, options.max_tokens))
        yield running


def level(server: Server, streams: int, options: argparse.Namespace, seed: int) -> Level:
    """So many answers at once."""
    return at_once(server, streams, options.max_tokens, seed).level()


def at_once(server: Server, streams: int, tokens: int, seed: int) -> Run:
    """The same, each by itself."""
    length = {"words": WORDS, "max_tokens": tokens, "seed": seed}
    return asyncio.run(run(server, streams, streams, **length))


def contention(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the first table."""
    for name in options.paths:
        with served(options, PATHS[name]) as running:
            server = running.server
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


@dataclass(frozen=True)
class Turn:
    """One number of streams, in process and then over HTTP; times in milliseconds."""

    inside: float  # a step
    serving: float  # a step of the server, by its own notes
    token: float  # the processor's time beside the computing, for each token
    request: float  # and for each request besides
    to_client: float  # from the end of a step to the last of its tokens, for each of them
    level: Level


def to_the_socket(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the second table."""
    inside = Inside(options.folder, NATIVE_KERNELS="true")
    stamps = options.scratch / "stamps"
    try:
        with served(options, PATHS["native kernels"], stamps) as running:
            for streams in options.streams:
                turn = functools.partial(one_turn, inside, running, stamps, streams, options)
                turn(99)  # nobody's first time counts
                yield socket_row(streams, [turn(100 + i) for i in range(3 * options.rounds)])
    finally:
        inside.close()
        stamps.unlink(missing_ok=True)


def one_turn(
    inside: Inside,
    running: servers.Running,
    stamps: Path,
    streams: int,
    options: argparse.Namespace,
    seed: int,
) -> Turn:
    """Measure one turn."""

    def asked(tokens: int, seed: int) -> tuple[Run, float]:
        before = servers.thread_times(running.pid)
        answered = at_once(running.server, streams, tokens, seed)
        after = servers.thread_times(running.pid)
        spent = sorted(after[task] - before.get(task, 0) for task in after)
        return answered, sum(spent[: -len(os.sched_getaffinity(0))])  # as many compute as cores

    step = inside.step_ms(streams, options.max_tokens)
    _, little = asked(FEW, 2 * seed)  # prompts are new each time
    began = time.perf_counter()
    answered, much = asked(options.max_tokens, 2 * seed + 1)
    token = (much - little) / streams / (options.max_tokens - FEW)
    full = [(a, b) for (a, _), (b, n) in itertools.pairwise(steps(stamps, began)) if n == streams]
    return Turn(
        inside=step,
        serving=1e3 * statistics.median(end - begin for begin, end in full),
        token=1e3 * token,
        request=1e3 * (little / streams - FEW * token),
        to_client=1e3 * statistics.median(deliveries(full, answered.answers)) / streams,
        level=answered.level(),
    )


def deliveries(full: list[tuple[float, float]], answers: list[Answer]) -> Iterator[float]:
    """Seconds from the end of a step until all its tokens have come, where that is by the next."""
    moments = sorted(moment for answer in answers for moment in answer.moments)
    for ended, next_ended in full:
        came = moments[bisect_left(moments, ended) : bisect_left(moments, next_ended)]
        if len(came) == len(answers):
            yield came[-1] - ended


def socket_row(streams: int, turns: list[Turn]) -> list[str]:
    """One number of streams."""
    median = statistics.median
    inside = median(turn.inside for turn in turns)
    more = median(turn.serving / turn.inside - 1 for turn in turns)
    token = median(turn.token for turn in turns)
    to_client = median(turn.to_client for turn in turns)
    tails = (
        median(turn.level.steady_p95_ms / turn.level.steady_ms for turn in turns),
        median(turn.level.gap_p95_ms / turn.level.gap_ms for turn in turns),
    )
    return [
        f"{streams}",
        f"{inside:.2f}",
        f"{median(turn.serving for turn in turns):.2f} ({100 * more:+.1f} %)",
        f"{1000 * token:.0f} ({100 * token / inside:.1f} %)",
        f"{1000 * to_client:.0f} ({100 * to_client / inside:.1f} %)",
        f"{median(turn.request for turn in turns):.1f}",
        f"{tails[0]:.2f} ({tails[1]:.2f})",
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
    heads = ["streams", "step in process, ms", "while serving", "beside the engine, µs per token"]
    heads += ["to the client, µs per token", "ms per request", "p95 / median gap"]
    parts.append(printed(table(heads, told(to_the_socket(options)))))
    parts.append(
        printed(
            "Beside the engine: the processor's time of all threads of the server that do not "
            "compute, for each token after the first few, and for each request besides. To the "
            "client: from the end of a step until the last of its tokens has come, over their "
            "number. In brackets their share of a step; asked for: 100 µs or 5 %. Gaps while "
            "nobody's prompt is read; in brackets over the whole run, with the reading of prompts "
            "at its start; asked for: at most 1.5 with 32 streams. "
            f"{today()}, {options.model}: medians of {options.rounds} rounds, three times as many "
            f"for the second table. {machine()}."
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
