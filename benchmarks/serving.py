"""Our server beside `transformers serve`, with the same model folder, in one run.

    python -m benchmarks.serving                            our server alone
    python -m benchmarks.serving --peer-python ENV/bin/python
                                                            both; ENV has transformers[serving]

The servers run one at a time and take turns, round by round, so that a machine that others share
treats them alike; each cell is the median over the rounds. Prompts differ in their first word, so
no prefix cache helps anybody, and every answer has the same number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.load import Level, Server, ask, measure
from transformers_api.serving.builtin_models import builtin_models
from transformers_api.serving.store import ModelStore
from transformers_api.settings import Settings

OURS = "transformers-api"
MODEL = "benchmark"


@dataclass(frozen=True)
class Contender:
    """How to start one server, and what its requests need."""

    name: str
    command: list[str]  # `{port}` stands for the port
    environment: dict[str, str]
    ready: str  # path that answers 200 once it can serve
    model: str
    fields: dict[str, Any]


def ours(folder: Path, options: argparse.Namespace, scratch: Path) -> Contender:
    """Our server, with a registry that has this one model."""
    registry = scratch / "registry.json"
    registry.write_text(json.dumps([{"name": MODEL, "path": str(folder)}]))
    return Contender(
        name=OURS,
        command=[sys.executable, "-m", "transformers_api", "serve"],
        environment={
            "HOST": "127.0.0.1",
            "PORT": "{port}",
            "MODEL_REGISTRY_PATH": str(registry),
            "DEFAULT_MODEL": MODEL,
            "DTYPE": options.dtype,
        },
        ready="/readyz",
        model=MODEL,
        fields={"ignore_eos": True, "stream_options": {"include_usage": True}},
    )


def peer(folder: Path, options: argparse.Namespace, extra: str) -> Contender:
    """`transformers serve` with ``extra`` arguments."""
    length = {"min_new_tokens": options.max_tokens, "max_new_tokens": options.max_tokens}
    command = [
        str(Path(options.peer_python).with_name("transformers")),
        *("serve", str(folder), "--host", "127.0.0.1", "--port", "{port}"),
        *("--dtype", options.peer_dtype or options.dtype, *shlex.split(extra)),
    ]
    return Contender(
        name=" ".join(["transformers serve", extra]).strip(),
        command=command,
        environment={"HF_HUB_OFFLINE": "1"},
        ready="/health",
        model=str(folder),
        fields={"generation_config": json.dumps({**length, "do_sample": False})},
    )


@contextlib.contextmanager
def running(contender: Contender, log: IO[bytes]) -> Iterator[Server]:
    """Start the server, wait until it can serve, and end it with all its children."""
    port = free_port()
    process = subprocess.Popen(
        [part.replace("{port}", str(port)) for part in contender.command],
        env={
            **os.environ,
            **{k: v.replace("{port}", str(port)) for k, v in contender.environment.items()},
        },
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}{contender.ready}")
        yield Server(f"http://127.0.0.1:{port}/v1", contender.model, contender.fields)
    finally:
        end(process)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], url: str, limit_s: float = 300) -> None:
    """Return when ``url`` answers 200. Raises RuntimeError when the process ends or time is up."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} was not ready within {limit_s:g} seconds")


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process group, SIGKILL to what is left after ten seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    process.wait()


def one_round(server: Server, options: argparse.Namespace, seed: int) -> dict[int, Level]:
    """Warm up, then measure every number of streams once."""
    asyncio.run(ask(server, "Say hello.", options.max_tokens))
    return {
        streams: asyncio.run(
            measure(
                server,
                streams,
                max(options.requests, streams),
                words=options.words,
                max_tokens=options.max_tokens,
                seed=seed + streams,
            )
        )
        for streams in options.streams
    }


def run(contenders: list[Contender], options: argparse.Namespace) -> dict[str, list[dict]]:
    """All rounds of all contenders: name to one result per round."""
    results: dict[str, list[dict]] = {contender.name: [] for contender in contenders}
    for number in range(options.rounds):
        # Every other round begins with the last one: neither always has the warmer machine.
        for contender in contenders[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryFile() as log:
                try:
                    with running(contender, log) as server:
                        results[contender.name].append(one_round(server, options, 1000 * number))
                except Exception:
                    log.seek(0)
                    sys.stderr.buffer.write(log.read()[-4000:])
                    raise
            print(f"round {number + 1}: {contender.name} measured", file=sys.stderr)
    return results


def median(rounds: list[dict[int, Level]], streams: int, name: str) -> float:
    """The median of one figure over the rounds."""
    return statistics.median(getattr(levels[streams], name) for levels in rounds)


def table(results: dict[str, list[dict]], streams: list[int]) -> str:
    """A Markdown table; the last column is our throughput over theirs."""
    lines = [
        "| streams | server | first token, ms | between tokens, ms | tokens/s | ours / theirs |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for count in streams:
        mine = median(results[OURS], count, "tokens_per_s")
        for name, rounds in results.items():
            speed = median(rounds, count, "tokens_per_s")
            lines.append(
                f"| {count} | {name} | {median(rounds, count, 'ttft_ms'):.0f} "
                f"| {median(rounds, count, 'itl_ms'):.1f} | {speed:.1f} "
                f"| {'' if name == OURS else f'{mine / speed:.1f}x'} |"
            )
    return "\n".join(lines)


def conditions(results: dict[str, list[dict]], options: argparse.Namespace) -> str:
    """What the numbers hold for: machine, versions, lengths."""
    level = next(iter(results[OURS][0].values()))
    theirs = options.peer_dtype or options.dtype
    dtypes = options.dtype if theirs == options.dtype else f"{options.dtype} (theirs: {theirs})"
    return (
        f"{options.shown}, {dtypes}, prompts of about {level.prompt_tokens} tokens, answers of "
        f"{options.max_tokens}; medians of {options.rounds} rounds. {processor()}, "
        f"{len(os.sched_getaffinity(0))} cores, {memory_gib():.0f} GiB; "
        f"torch {importlib.metadata.version('torch')}, "
        f"transformers {importlib.metadata.version('transformers')}, "
        f"Python {platform.python_version()}."
    )


def processor() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers."""
    return [int(part) for part in text.split(",")]


def default_model_folder() -> Path:
    """The embedded model, converted on first use."""
    settings = Settings.from_env()
    spec = next(spec for spec in builtin_models() if spec.name == "smollm2-135m-instruct")
    return ModelStore(settings).prepare(spec, lambda _share, _what: None).folder


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a model in the transformers format")
    parser.add_argument("--peer-python", help="python of an environment with transformers[serving]")
    parser.add_argument(
        "--peer-options",
        action="append",
        help='arguments of `transformers serve`, such as "--continuous-batching"; repeat it for '
        "several variants, with an empty one for none",
    )
    parser.add_argument("--dtype", default="float32", help="of both servers; default: float32")
    parser.add_argument("--peer-dtype", help="another one for the peer")
    parser.add_argument(
        "--streams",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 4, 8, 16],
    )
    parser.add_argument("--requests", type=int, default=4, help="at least, per level and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=40, help="length of the prompts")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the answers")
    options = parser.parse_args(arguments)
    if options.peer_python and not options.peer_options:
        options.peer_options = [""]
    return options


def main() -> None:
    """Measure, then print the table and what it holds for."""
    options = parse()
    folder = options.folder or default_model_folder()
    options.shown = options.folder.name if options.folder else "SmolLM2-135M-Instruct"
    with tempfile.TemporaryDirectory() as scratch:
        contenders = [ours(folder, options, Path(scratch))]
        contenders += [peer(folder, options, extra) for extra in options.peer_options or []]
        results = run(contenders, options)
    print(table(results, options.streams))
    print()
    print(conditions(results, options))


if __name__ == "__main__":
    main()
