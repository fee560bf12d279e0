"""Tokens per second of architectures at a hundred million weights, beside plain torch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, today
from benchmarks.pages import table

NAMES = ("llama", "gemma3_text", "cohere", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "phi3")
PROMPT = list(range(10, 42))
TOKENS = 48
THREADS = 2


def rows(names: list[str], native: Path | None) -> Iterator[list[str]]:
    """A row of the table for each model; its weights, our speed, that of ``generate()``."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield _row(name, Path(folder), native)


def speed_table(made: list[list[str]]) -> str:
    """The table and what it was measured on."""
    heads = ["model type", "weights, millions", "ours, tokens/s", "generate(), tokens/s", "ratio"]
    how = "bfloat16, one stream; `generate()` on one thread or two, whichever is faster"
    return f"{table(heads, made)}\n\n{how}. {today()}; {machine()}."


def _row(name: str, folder: Path, native: Path | None) -> list[str]:
    from transformers import AutoModelForCausalLM

    from benchmarks.tiny_models import random_weights, shape_100m

    model: Any = random_weights(AutoModelForCausalLM.from_config(shape_100m(name))).bfloat16()
    model.save_pretrained(folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    theirs = max(_generate(model, threads) for threads in (1, THREADS))
    del model
    ours = _serve(folder, native)
    return [
        f"`{name}`",
        f"{weights / 1e6:.0f}",
        f"{ours:.0f}",
        f"{theirs:.0f}",
        f"{ours / theirs:.1f}",
    ]


def _generate(model: Any, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)

    def run(count: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                torch.tensor([PROMPT]),
                attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - began

    run(2)
    first = run(1)
    return (TOKENS - 1) / (run(TOKENS) - first)


def _serve(folder: Path, native: Path | None) -> float:
    from transformers_api.engine.base import SamplingParams, SequenceRequest
    from transformers_api.engine.load_options import LoadOptions
    from transformers_api.engine.loader import load_engine
    from transformers_api.engine.thread import EngineThread

    thread = EngineThread(num_threads=THREADS)
    options = LoadOptions(num_slots=2, native=native, dtype="bfloat16")
    engine = thread.call(lambda: load_engine(folder, options, thread)).result()
    try:
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        best = 0.0
        for _ in range(3):
            times = [
                time.perf_counter()
                for output in engine.submit([SequenceRequest(PROMPT, params)]).read(quiet_s=120)
                if output is not None and output.token_id is not None
            ]
            best = max(best, (len(times) - 1) / (times[-1] - times[0]))
        return best
    finally:
        engine.close()
        thread.stop()
