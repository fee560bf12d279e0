"""The cost of adapters (LoRA): a model and the same with adapters, taking turns in one engine.

    python -m benchmarks.adapters [--folder FOLDER] [--rank 16]

Adapters have random numbers and all linear layers but the head. Cells are medians of the rounds:
tokens per second of all streams together.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import default_model_folder, machine, today
from transformers_api.config.settings import Settings
from transformers_api.engine.adapter_source import AdapterLayer, AdapterSource
from transformers_api.engine.base import Engine, SamplingParams, SequenceRequest
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.thread import EngineThread

PROMPT, TOKENS = 64, 48
ADAPTERS = 8
STREAMS = (1, 8)


def layers(model: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of all linear layers but the head, by their paths."""
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if hasattr(module, "in_features") and not path.endswith("lm_head")
    }


def adapter(path: Path, sizes: dict[str, tuple[int, int]], rank: int) -> AdapterSource:
    """An adapter with random numbers in a file, in 16 bits as most have them."""
    tensors = {}
    for layer, (inputs, outputs) in sizes.items():
        tensors[f"{layer}.A"] = torch.randn(rank, inputs, dtype=torch.bfloat16) / math.sqrt(inputs)
        tensors[f"{layer}.B"] = torch.randn(outputs, rank, dtype=torch.bfloat16) / 100
    save_file(tensors, path)
    parts = tuple(AdapterLayer(each, f"{each}.A", f"{each}.B", 1.0) for each in sizes)
    return AdapterSource(path.stem, path, parts, 2 * path.stat().st_size)


def tokens_per_s(engines: Sequence[Engine], start: int) -> float:
    """Of a stream for each engine, from their first tokens on."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    prompts = [[start + i, *range(100, 100 + PROMPT - 1)] for i in range(len(engines))]
    streams = [
        engine.submit([SequenceRequest(prompt, params)])
        for engine, prompt in zip(engines, prompts, strict=True)
    ]
    for stream in streams:
        stream.get()
    began = time.perf_counter()
    for stream in streams:
        output = stream.get()
        while output is not None and output.finish_reason is None:
            output = stream.get()
    return len(engines) * (TOKENS - 1) / (time.perf_counter() - began)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="a model in the transformers format")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder or default_model_folder()
    settings = Settings.from_env()
    load = LoadOptions(native=settings.native_cache, quantization=options.quantization)
    thread = EngineThread(settings.torch_threads)
    engine = thread.call(lambda: load_engine(folder, load, thread)).result()
    with tempfile.TemporaryDirectory() as own:
        sizes = engine.call(layers).result()
        sources = [
            adapter(Path(own) / f"{i}.safetensors", sizes, options.rank) for i in range(ADAPTERS)
        ]
        began = time.perf_counter()
        adapted = [engine.adapted(source) for source in sources]
        read_ms = 1000 * (time.perf_counter() - began) / ADAPTERS
        _write_table(engine, adapted, options.rounds)
    size = engine.stats().adapters[0].bytes / 1e6
    print(f"\nRank {options.rank}, {size:.1f} MB in memory, read in {read_ms:.0f} ms.")
    print(f"{folder.name}, {engine.describe().weights}. {today()}; {machine()}.")
    engine.close()
    thread.stop()


def _write_table(engine: Engine, adapted: Sequence[Engine], rounds: int) -> None:
    print("| streams | base | one adapter | ratio | half of them | an adapter each |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for streams in STREAMS:
        cases = {
            "base": [engine] * streams,
            "one": [adapted[0]] * streams,
            "half": [*[engine] * (streams - streams // 2), *[adapted[0]] * (streams // 2)],
            "each": [adapted[i % ADAPTERS] for i in range(streams)],
        }
        figures: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(rounds + 1):  # the first one warms up
            for name, engines in cases.items():
                figures[name].append(tokens_per_s(engines, 1000 + 10 * turn))
        base, one, half, each = (statistics.median(own[1:]) for own in figures.values())
        print(
            f"| {streams} | {base:.0f} | {one:.0f} | {one / base:.2f} | {half:.0f} | {each:.0f} |"
        )


if __name__ == "__main__":
    main()
