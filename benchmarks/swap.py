"""From one model to another: the time to the first token of a model that is not in memory.

    python -m benchmarks.swap
    python -m benchmarks.swap --peer-python build/peers/transformers/bin/python
    python -m benchmarks.swap --model 1.1b.Q4_0.gguf --rounds 3 --least

Both models lie ready on the disk. "first swap": A is in memory and has answered, B is asked for the
first time. "swap": A and B, asked by turns after that; ours evicts one before the other comes, and
`transformers serve`, which keeps both, is compared by its one load. "start": the process is started
and asked at once when it is ready. Ours is started twice in a round: with a store in which nothing
is kept of either model, which gives "new start" and "new swap", and again, once its packed weights
have been written. Beside a GGUF file llama-server is started, which has one model. Servers take
turns, round by round; medians, or the least with ``--least``, as where others use the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import servers
from benchmarks.load import HELLO, ask
from benchmarks.machine import machine, model_folder, today
from benchmarks.pages import table, write_block
from benchmarks.servers import OURS, Contender

TOKENS = 4
SECOND = "second"
STORE = "store-swap"
LLAMA = "llama-server"
LLAMA_SLOTS = 8
TIMES = ("new swap", "first swap", "swap", "new start", "start")
HEADS = (
    *("a model that is new here", "new to the process", "that was there before"),
    *("start, the model new", "start"),
)
CHANGES = 4  # there and back, after the first
ASKED = "5x, and under 1.2 s for 135M"


def twin(folder: Path, scratch: Path) -> Path:
    """The same model under another name."""
    other = scratch / f"{folder.name}-twin"
    other.mkdir(parents=True, exist_ok=True)
    if folder.is_file():  # a link that can be told from it
        if not (other / folder.name).exists():
            (other / folder.name).hardlink_to(folder)
        return other / folder.name
    for file in folder.iterdir():
        link = other / file.name
        if not link.exists():
            link.symlink_to(file.resolve())
    return other


def ours(first: Path, second: Path, scratch: Path) -> Contender:
    """Our server with both in its registry."""
    registry = scratch / "registry-swap.json"
    folders = {servers.MODEL: first, SECOND: second}
    entries = [{"name": name, "path": str(folder)} for name, folder in folders.items()]
    registry.write_text(json.dumps(entries))
    contender = servers.ours(first, scratch, NATIVE_KERNELS="true")
    own = {"MODEL_REGISTRY_PATH": str(registry), "MODEL_STORE": str(scratch / STORE)}
    return replace(contender, environment={**contender.environment, **own})


def peer(python: Path, first: Path) -> Contender:
    """`transformers serve`, which loads what it is asked for."""
    contender = servers.transformers_serve(python, first, TOKENS)
    command = [part for part in contender.command if part != str(first)]
    return replace(contender, command=command)


def one_round(contender: Contender, second: str, scratch: Path) -> dict[str, float]:
    """Start it, ask A, then B; ours knows nothing of them first, then what it found out."""
    if contender.name == LLAMA:
        start = one_start(contender)
        return {"new start": start, "start": start}
    if contender.name != OURS:
        start, new, _ = one_process(contender, second, changes=0)
        return dict(zip(TIMES, (new, new, new, start, start), strict=True))
    shutil.rmtree(scratch / STORE, ignore_errors=True)
    packed = scratch / STORE / "packed"
    new_start, new_swap, _ = one_process(contender, second, changes=0, writes=packed)
    start, first_swap, swaps = one_process(contender, second, CHANGES)
    times = new_swap, first_swap, statistics.median(swaps), new_start, start
    return dict(zip(TIMES, times, strict=True))


def one_start(contender: Contender) -> float:
    """Seconds from the start to the first token."""
    with tempfile.TemporaryFile() as log, servers.running(contender, log) as running:
        return running.ready_s + asyncio.run(ask(running.server, HELLO, TOKENS)).first


def one_process(
    contender: Contender, second: str, changes: int, writes: Path | None = None
) -> tuple[float, float, list[float]]:
    """Seconds until the first token: of the start, of B, and of as many ``changes`` after that.

    ``writes``: the folder that the process writes packed weights into, of both models.
    """
    with tempfile.TemporaryFile() as log:
        try:
            with servers.running(contender, log) as running:
                first = asyncio.run(ask(running.server, HELLO, TOKENS)).first
                wait_for_files(writes, 1)
                other = replace(running.server, model=second)
                new = asyncio.run(ask(other, HELLO, TOKENS)).first
                wait_for_files(writes, 2)
                turns = [running.server, other] * (changes // 2)
                swaps = [asyncio.run(ask(each, HELLO, TOKENS)).first for each in turns]
                return running.ready_s + first, new, swaps
        except Exception:
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-4000:])
            raise


def wait_for_files(folder: Path | None, count: int, limit_s: float = 60) -> None:
    """Return once so many packed models lie in ``folder``, or none do after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while folder and len(list(folder.glob("*.packed"))) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def rows(
    found: dict[str, list[dict[str, float]]],
    of_rounds: Callable[[list[float]], float] = statistics.median,
) -> list[list[str]]:
    """A line for each server; ratios to ours. What a server does not do is left empty."""
    middles = {
        name: {what: of_rounds([each[what] for each in rounds]) for what in rounds[0]}
        for name, rounds in found.items()
        if rounds
    }
    mine = middles.get(OURS)
    lines = []
    for name, middle in middles.items():
        cells = [name]
        for what in TIMES:
            if what not in middle:
                cells += ["", ""]
                continue
            ratio = f"{middle[what] / mine[what]:.1f}x" if mine and name != OURS else ""
            cells += [f"{middle[what]:.2f}", ratio]
        lines.append(cells)
    return lines


def peers(first: Path, options: argparse.Namespace) -> list[Contender]:
    """Those that are installed and read the model."""
    if first.is_file():
        if not options.llama_python.is_file():
            return []
        llama = servers.llama_server(options.llama_python.absolute(), first, "", LLAMA_SLOTS)
        return [replace(llama, name=LLAMA)]
    python = options.peer_python
    return [peer(python.absolute(), first)] if python.is_file() else []


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("build/peers/transformers/bin/python")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--other", default="", help="the second model; default: the same again")
    parser.add_argument("--peer-python", type=Path, default=default)
    llama = Path("build/peers/llama/bin/python")
    parser.add_argument("--llama-python", type=Path, default=llama)
    parser.add_argument("--least", action="store_true", help="the least of the rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--write", type=Path, help="a page to write into")
    options = parser.parse_args()
    servers.end_on_signals()
    scratch = options.scratch.absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    is_file = options.model.endswith(".gguf")
    first = Path(options.model).absolute() if is_file else model_folder(options.model, scratch)
    second = model_folder(options.other, scratch) if options.other else twin(first, scratch)
    contenders = [ours(first, second, scratch), *peers(first, options)]
    found: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
    for number in range(options.rounds):
        for contender in contenders[:: 1 if number % 2 == 0 else -1]:
            name = SECOND if contender.name == OURS else str(second)
            found[contender.name].append(one_round(contender, name, scratch))
            print(f"round {number + 1}: {contender.name}: {found[contender.name][-1]}", flush=True)
    heads = [text for head in HEADS for text in (f"{head}, s", "theirs / ours")]
    of_rounds = min if options.least else statistics.median
    text = table(["server", *heads], rows(found, of_rounds))
    text += "\n\nTo the first token. New here: no process of this machine has loaded it. "
    text += "`transformers serve` keeps both models; its one load stands for all kinds of swap. "
    text += f"Asked for: a swap {ASKED}; a start 2x. {today()}, "
    text += f"{options.model}, "
    name = "least" if options.least else "medians"
    text += f"{name} of {options.rounds} rounds. {machine()}."
    print(f"\n{text}")
    if options.write:
        write_block(options.write, "swap", text)


if __name__ == "__main__":
    main()
