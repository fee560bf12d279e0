"""Measure engines on a CUDA device: random weights of known shapes, beside ``generate()``.

    python -m benchmarks.gpu --scratch FOLDER
    python -m benchmarks.gpu --scratch FOLDER --shapes 1b --streams 1,8 --write docs/performance.md

In process, bfloat16, greedy streams of 128 tokens after 32. "Without graphs" is the same runner
with its decode steps launched one by one. The memory's speed is that of a copy of 4 GiB on the
device; a share of it is (bytes of weights) x (steps per second), keys and values not counted. The
first token is that of a prompt of 2,000 tokens; a swap is from the unloading of one model to the
first token of the other, whose file the page cache holds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import today
from benchmarks.pages import table, write_block
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.runners.cuda_graphs import GraphRunner
from transformers_api.engine.thread import EngineThread

PROMPT, TOKENS, LONG = 32, 128, 2000
WINDOW = 4096
SHAPES = {  # those of Llama 3.2 1B and Llama 3.1 8B
    "1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        eos_token_id=None,
    ),
    "8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=WINDOW,
        eos_token_id=None,
    ),
}


@dataclass(frozen=True)
class Burst:
    """Streams that began together."""

    step_s: float  # seconds between two tokens of a stream, the median of the streams
    first_s: float  # seconds from submitting to the first token, the median of the streams


def model_folder(name: str, scratch: Path) -> Path:
    """A folder with a model of that shape, made if it is not there: random, bfloat16."""
    folder = scratch / f"random-{name}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = LlamaForCausalLM(SHAPES[name])
        finally:
            torch.set_default_dtype(default)
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return folder


def request(length: int, tokens: int, salt: int) -> SequenceRequest:
    """A greedy request for exactly ``tokens`` tokens; another ``salt``, another prompt."""
    ids = [(7919 * salt + 31 * place) % 100_000 + 10 for place in range(length)]
    return SequenceRequest(ids, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))


def burst(engine: BatchingEngine, streams: int, length: int, tokens: int, salt: int) -> Burst:
    """Measure ``streams`` requests that are submitted at once."""
    began = time.perf_counter()
    requests = [request(length, tokens, salt + number) for number in range(streams)]
    stream = engine.submit(requests)
    times: list[list[float]] = [[] for _ in range(streams)]
    for output in stream.read(quiet_s=120):
        if output.token_id is not None:
            times[output.index].append(time.perf_counter())
    return Burst(
        step_s=statistics.median((row[-1] - row[0]) / (len(row) - 1) for row in times),
        first_s=statistics.median(row[0] - began for row in times),
    )


def generate_step_s(model: Any, streams: int) -> float:
    """Seconds for a token of each stream in transformers' ``generate`` with a batch of them."""
    ids = torch.tensor([request(PROMPT, 1, n).prompt_ids for n in range(streams)], device="cuda")
    times = []
    with torch.inference_mode():
        for tokens in (8, 8, TOKENS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return (times[2] - times[1]) / (TOKENS - 8)


def memory_gb_per_s() -> float:
    """Speed of the device's memory: bytes read and written per second by a copy of 4 GiB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()  # type: ignore[no-untyped-call]
    for _ in range(10):
        target.copy_(source)
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    seconds: float = start.elapsed_time(end) / 1000
    return 10 * 2 * source.nbytes / seconds / 1e9


@contextmanager
def without_graphs(thread: EngineThread) -> Iterator[None]:
    """Launch every decode step while it lasts, with the same padding."""
    repeating = GraphRunner._repeating
    thread.call(lambda: setattr(GraphRunner, "_repeating", lambda *args: args[-1])).result()
    try:
        yield
    finally:
        thread.call(lambda: setattr(GraphRunner, "_repeating", repeating)).result()


class Bench:
    """One engine thread and the models under ``scratch``."""

    def __init__(self, scratch: Path, streams: list[int], rounds: int) -> None:
        self.scratch, self.streams, self.rounds = scratch, streams, rounds
        self.thread = EngineThread()
        self.salt = 0

    def load(self, name: str) -> BatchingEngine:
        """An engine on the device, with places for the largest number of streams."""
        folder = model_folder(name, self.scratch)
        options = LoadOptions(
            device="cuda", num_slots=max(self.streams), max_waiting=512, prefill_chunk=2048
        )
        return self.thread.call(lambda: load_engine(folder, options, self.thread)).result()

    def burst(self, engine: BatchingEngine, streams: int, length: int, tokens: int) -> Burst:
        """Medians of the rounds, each with prompts that were never read before.

        A round before them does what is done once, such as capturing.
        """
        bursts = []
        for _ in range(self.rounds + 1):
            self.salt += 1000
            bursts.append(burst(engine, streams, length, tokens, self.salt))
        return Burst(
            step_s=statistics.median(one.step_s for one in bursts[1:]),
            first_s=statistics.median(one.first_s for one in bursts[1:]),
        )

    def rows(self, name: str, copy_gb_per_s: float) -> Iterator[list[str]]:
        """Lines of the table of streams for one shape."""
        engine = self.load(name)
        weights = sum(parameter.nbytes for parameter in engine.model.parameters())
        for streams in self.streams:
            captured = self.burst(engine, streams, PROMPT, TOKENS).step_s
            with without_graphs(self.thread):
                launched = self.burst(engine, streams, PROMPT, TOKENS).step_s
            peer = self.thread.call(partial(generate_step_s, engine.model, streams)).result()
            yield [
                name,
                f"{streams}",
                f"{streams / captured:,.0f}",
                f"{streams / launched:,.0f}",
                f"{streams / peer:,.0f}",
                f"{peer / captured:.1f}x",
                f"{100 * weights / captured / 1e9 / copy_gb_per_s:.0f} %",
            ]
        engine.close()

    def first_token_ms(self, name: str) -> float:
        """Milliseconds from submitting a prompt of ``LONG`` tokens to its first token."""
        engine = self.load(name)
        first = self.burst(engine, 1, LONG, 2).first_s
        engine.close()
        return 1000 * first

    def swap_s(self, names: tuple[str, str]) -> float:
        """Seconds from closing an engine of the first to the first token of the second."""
        engine = self.load(names[0])
        burst(engine, 1, PROMPT, 2, 0)
        began = time.perf_counter()
        engine.close()
        engine = self.load(names[1])
        loaded = time.perf_counter()
        first_s = burst(engine, 1, PROMPT, 2, 0).first_s
        engine.close()
        return loaded - began + first_s


def main() -> None:
    """Measure and print, or write, the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, required=True, help="where the models are made")
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--streams", default="1,8,32,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a page with a place for the tables")
    options = parser.parse_args()
    shapes = options.shapes.split(",")
    bench = Bench(options.scratch, [int(n) for n in options.streams.split(",")], options.rounds)
    copied = bench.thread.call(memory_gb_per_s).result()
    rows = []
    for name in shapes:
        for row in bench.rows(name, copied):
            print(" | ".join(row), flush=True)
            rows.append(row)
    heads = ("shape", "streams", "tokens/s", "without graphs", "generate()", "ratio", "of memory")
    lines = [table(heads, rows)]
    lines += [f"First token, {n}: {bench.first_token_ms(n):.0f} ms." for n in shapes]
    if len(shapes) > 1:
        seconds = bench.swap_s((shapes[0], shapes[1])), bench.swap_s((shapes[1], shapes[0]))
        lines.append("Swap {} to {}: {:.1f} s, back: {:.1f} s.".format(*shapes[:2], *seconds))
    lines.append(
        f"{torch.cuda.get_device_name()}, copies {copied:,.0f} GB/s, torch {torch.__version__}, "
        f"bfloat16, medians of {options.rounds} rounds, {today()}."
    )
    text = "\n\n".join(lines)
    print(text)
    if options.write:
        write_block(options.write, "gpu", text)
    bench.thread.stop()


if __name__ == "__main__":
    main()
