"""TinyGPT and TinyGPT-MoE at full size, served over HTTP, beside the speed that its page promised.

    python -m benchmarks.tinygpt

The weights are random, which costs the same time as trained ones. One stream at a time, sampled as
the original does by default; tokens per second count from sending the request to its last token, as
the original's ``tokens_per_second`` does; medians over all requests of all rounds.

"recomputed" is the original's way on this machine: the whole text through the model for every
token, in plain torch. The last columns say what holds us back: the weights that one token reads,
and how fast they are read.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.load import Level, measure
from benchmarks.machine import machine
from benchmarks.servers import ours, running
from transformers_api.checkpoints.tokenizers import make
from transformers_api.families.tinygpt import TinyGPTConfig

SAMPLING = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}  # the original's defaults


@dataclass(frozen=True)
class Form:
    """One model of the page, and the tokens per second that it gives for a CPU."""

    name: str
    config: TinyGPTConfig
    promised: tuple[int, int]


FORMS = (
    Form("TinyGPT", TinyGPTConfig(intermediate_size=2048), (30, 50)),
    Form("TinyGPT-MoE", TinyGPTConfig(intermediate_size=1024, num_experts=4), (25, 40)),
)


def build(form: Form, folder: Path) -> Any:
    """A folder with random weights and TinyGPT's tokenizer; the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(form.config)
    model.save_pretrained(folder)
    make("gpt2", folder, form.config.vocab_size, False).save_pretrained(folder)
    return model


def read_per_token(model: Any) -> int:
    """Weights that one token multiplies with: no rows of tables, and only its own experts."""
    config = model.config
    tables = config.max_position_embeddings * config.hidden_size
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = 1 - config.num_experts_per_tok / config.num_experts if config.num_experts else 0
    return sum(p.numel() for p in model.parameters()) - tables - round(experts * idle)


def memory_gb_per_s(dtype: torch.dtype, rounds: int = 7) -> float:
    """How fast this machine reads weights that no cache holds, while it multiplies with them."""
    weights = torch.ones(16384, 8192, dtype=dtype)  # half a gigabyte in float32
    x = torch.ones(8192, dtype=dtype)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mv(weights, x)
        times.append(time.perf_counter() - began)
    return weights.nbytes / 1e9 / min(times)


def recomputed_per_s(model: Any, prompt: int, length: int, rounds: int = 3) -> float:
    """Tokens per second without a cache: every step reads the whole text, as the original does."""
    speeds = []
    with torch.inference_mode():
        for _ in range(rounds):
            ids = torch.arange(prompt)[None]
            began = time.perf_counter()
            for _ in range(length):
                logits = model(ids, use_cache=False).logits[:, -1]
                ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
            speeds.append(length / (time.perf_counter() - began))
    return statistics.median(speeds)


def one_form(form: Form, options: argparse.Namespace) -> tuple[list[Level], Any]:
    """Every request as a level of its own, and the model."""
    levels: list[Level] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model = build(form, folder)
        contender = ours(folder, Path(scratch), DTYPE=options.dtype)
        contender.fields.update(SAMPLING)
        for number in range(options.rounds):
            with tempfile.TemporaryFile() as log:
                try:
                    with running(contender, log) as started:
                        levels += requests(started.server, options, number)[
                            1:
                        ]  # the first one warms up
                except Exception:
                    log.seek(0)
                    sys.stderr.buffer.write(log.read()[-4000:])
                    raise
    return levels, model


def requests(server: Any, options: argparse.Namespace, number: int) -> list[Level]:
    """One request after another."""
    sizes = {"words": options.words, "max_tokens": options.max_tokens}
    return [
        asyncio.run(measure(server, 1, 1, seed=1000 * number + each, **sizes))
        for each in range(options.requests + 1)
    ]


def row(form: Form, levels: list[Level], model: Any, options: argparse.Namespace) -> str:
    """A line of the table."""
    speed = statistics.median(level.tokens_per_s for level in levels)
    model = model.eval().to(getattr(torch, options.dtype))
    recomputed = recomputed_per_s(model, levels[0].prompt_tokens, options.max_tokens)
    slowest, fastest = (choose(level.tokens_per_s for level in levels) for choose in (min, max))
    between_ms = statistics.median(level.itl_ms for level in levels)
    size = read_per_token(model) * getattr(torch, options.dtype).itemsize
    low, high = form.promised
    return (
        f"| {form.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M "
        f"| {speed:.0f} ({slowest:.0f} to {fastest:.0f}) | {low} to {high} | {speed / high:.1f}x "
        f"| {recomputed:.1f} | {speed / recomputed:.1f}x "
        f"| {between_ms:.1f} | {size / 1e6:.0f} | {size / 1e6 / between_ms:.1f} |"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3, help="starts of the server")
    parser.add_argument("--requests", type=int, default=5, help="per round")
    parser.add_argument("--words", type=int, default=8, help="length of the prompts")
    parser.add_argument("--max-tokens", type=int, default=100, help="length of the answers")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print the table and what it holds for."""
    options = parse()
    reads = [memory_gb_per_s(getattr(torch, options.dtype))]
    print(
        "| model | tokens/s | promised | ours / upper figure | recomputed | ours / recomputed "
        "| ms per token | MB read per token | GB/s |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for form in FORMS:
        levels, model = one_form(form, options)
        print(row(form, levels, model, options), flush=True)
        reads.append(memory_gb_per_s(getattr(torch, options.dtype)))
    print(f"\nThis machine's memory gives {max(reads):.1f} GB/s to a matrix-vector product.")
    print(
        f"Random weights, {options.dtype}, prompts of about {levels[0].prompt_tokens} tokens, "
        f"answers of {options.max_tokens}; {options.rounds} rounds. {machine()}."
    )


if __name__ == "__main__":
    main()
