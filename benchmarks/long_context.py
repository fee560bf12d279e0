"""Long prompts: how fast they are read, and what their keys and values take.

    python -m benchmarks.random_gguf 1.1b Q4_0 build/1.1b.gguf --context 32768
    python -m benchmarks.long_context build/1.1b.gguf
    python -m benchmarks.long_context build/1.1b.gguf --write docs/performance.md
    python -m benchmarks.long_context build/1.1b.gguf --passes

A server for each KV_CACHE_DTYPE reads prompts of random tokens over HTTP, one at a time, none of
which it has seen before, and writes two tokens. Once each, after one that nobody counts. Tokens for
a second of a core tell the same beside other programs. ``--passes``: in this process, on one core,
passes of 256 tokens at some places of the prompt stand for all of them: minutes instead of hours.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks import servers
from benchmarks.inside import Inside
from benchmarks.load import Server
from benchmarks.machine import machine, today
from benchmarks.pages import table, write_block
from transformers_api.engine.runners.model_runner import innermost

PASS, ROUNDS = 256, 3  # tokens; the least time counts
OF_PASSES = [
    *("keys and values", "prompt, tokens", "core-ms/token at its end"),
    *("tokens/core-second", "of the first"),
]
HEADS = [
    *("keys and values", "a token's, KiB", "prompt, tokens", "seconds", "tokens/s"),
    *("tokens/core-second", "of the first"),
]


def answered(server: Server, tokens: int, chance: random.Random) -> float:
    """Seconds for a prompt of so many tokens and two more."""
    prompt = [chance.randrange(100, 40_000) for _ in range(tokens)]
    body = {"model": server.model, "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.base_url}/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    begin = time.perf_counter()
    with urllib.request.urlopen(request) as response:
        usage = json.load(response)["usage"]
    if usage["prompt_tokens"] != tokens:
        raise SystemExit(f"The prompt had {usage['prompt_tokens']} tokens.")
    return time.perf_counter() - begin


def token_bytes(server: Server) -> int:
    """Bytes of a token's keys and values."""
    with urllib.request.urlopen(f"{server.base_url.removesuffix('/v1')}/status") as response:
        status: dict[str, Any] = json.load(response)
    return int(status["resident"]["kv_cache"]["token_bytes"])


def core_seconds(server: Server) -> float:
    """Time of all cores that the server has used."""
    with urllib.request.urlopen(f"{server.base_url.removesuffix('/v1')}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("process_cpu_seconds_total"))


def measured(file: Path, kind: str, sizes: list[int], scratch: Path) -> list[list[str]]:
    """Rows of the table."""
    chance, rows, first = random.Random(0), [], 0.0
    contender = servers.ours(file, scratch, KV_CACHE_DTYPE=kind)
    with tempfile.TemporaryFile() as log, servers.running(contender, log) as running:
        answered(running.server, 100, chance)
        size = f"{token_bytes(running.server) / 1024:.1f}"
        for tokens in sizes:
            before = core_seconds(running.server)
            seconds = answered(running.server, tokens, chance)
            rate = tokens / (core_seconds(running.server) - before)
            first = first or rate
            figures = f"{seconds:.1f}", f"{tokens / seconds:.0f}", f"{rate:.0f}"
            rows.append([kind, size, f"{tokens}", *figures, f"{rate / first:.2f}x"])
            print(*rows[-1], file=sys.stderr)
    return rows


def passes(file: Path, kind: str, sizes: list[int], scratch: Path) -> list[list[str]]:
    """Rows of a table: whole prompts, by the time of some of their passes."""
    settings = {"KV_CACHE_DTYPE": kind, "TORCH_THREADS": "1", "MAX_INFLIGHT": "1"}
    inside = Inside(file, NATIVE_KERNELS="true", MODEL_STORE=str(scratch / "store"), **settings)
    engine: Any = inside.loaded.engine
    runner: Any = innermost(engine.runner)
    chance, longest = random.Random(0), max(sizes)
    others = range(longest // 4, longest, longest // 4)
    begins = sorted({0, *(size - PASS for size in sizes), *others})

    def seconds(begin: int) -> float:
        ids = [chance.randrange(100, 40_000) for _ in range(PASS)]
        with torch.inference_mode():
            before = time.thread_time()
            runner.read(ids, begin)
            return time.thread_time() - before

    def all_of_them() -> list[float]:
        if runner.cache.reserve(1, longest) is None:
            raise SystemExit("The KV cache has no room for that.")
        seconds(0)
        return list(map(min, *([seconds(begin) for begin in begins] for _ in range(ROUNDS))))

    found = inside.on_thread(all_of_them)
    rows, first = [], 0.0
    for tokens in sizes:
        whole = sum(numpy.interp(range(0, tokens, PASS), begins, found))
        first = first or tokens / whole
        last = found[begins.index(tokens - PASS)]
        figures = f"{1000 * last / PASS:.2f}", f"{tokens / whole:.0f}"
        rows.append([kind, f"{tokens}", *figures, f"{tokens / whole / first:.2f}x"])
    return rows


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a GGUF file, or a folder")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 16384], help="tokens")
    parser.add_argument("--kinds", nargs="*", default=["auto", "int8"])
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--passes", action="store_true")
    parser.add_argument("--write", type=Path, help="a page to write into")
    options = parser.parse_args()
    servers.end_on_signals()
    rows: list[list[str]] = []
    for kind in options.kinds:
        measure = passes if options.passes else measured
        rows += measure(options.file.absolute(), kind, options.sizes, options.scratch.absolute())
    text = table(OF_PASSES if options.passes else HEADS, rows)
    how = "by its passes" if options.passes else "once each"
    text += f"\n\n{today()}, {options.file.stem}, {how}. {machine()}."
    print(text)
    if options.write:
        write_block(options.write, "long context", text)


if __name__ == "__main__":
    main()
