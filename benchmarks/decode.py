"""Decode steps in process: plain linear layers beside packed ones, taking turns in one run.

    python -m benchmarks.decode --folder FOLDER

Each cell is the median of the rounds; sequences have about 64 tokens of context.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import default_model_folder, processor
from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.kv_cache import SlotCache
from transformers_api.engine.pretrained import load_model
from transformers_api.engine.runners.model_runner import ModelRunner
from transformers_api.engine.runners.packed_linear import pack_linears
from transformers_api.engine.sequence import Sequence

CONTEXT = 64
STEPS = 12


def step_ms(model: Any, rows: int) -> float:
    """The median time of a decode step of ``rows`` sequences."""
    config = model.config.get_text_config(decoder=True)
    cache = SlotCache(config.num_hidden_layers, rows, 2 * CONTEXT)
    runner = ModelRunner(model, cache, config.vocab_size)
    cache.reserve(rows, 2 * CONTEXT)
    sequences = []
    for slot in range(rows):
        request = SequenceRequest(list(range(10, 10 + CONTEXT)), SamplingParams(max_tokens=CONTEXT))
        stream = TokenStream(1, lambda _: None)
        seq = Sequence(request, stream, 0, eos_token_ids=frozenset(), max_model_len=2 * CONTEXT)
        seq.slot = slot
        runner.forward(Batch([seq], CONTEXT))
        seq.num_cached = CONTEXT
        seq.tokens.append(7)
        sequences.append(seq)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        runner.forward(Batch(sequences, 1))
        times.append(time.perf_counter() - began)
        for seq in sequences:
            seq.num_cached += 1
            seq.tokens.append(7)
    return 1000 * statistics.median(times)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="a model in the transformers format")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="1,4,16")
    options = parser.parse_args()
    folder = options.folder or default_model_folder()
    torch.set_grad_enabled(False)
    plain, packed = (load_model(folder, "cpu", options.dtype, False) for _ in range(2))
    pack_linears(packed)
    print("| sequences | plain, ms | packed, ms | plain / packed |")
    print("| ---: | ---: | ---: | ---: |")
    for rows in (int(part) for part in options.rows.split(",")):
        pairs = [(step_ms(plain, rows), step_ms(packed, rows)) for _ in range(options.rounds)]
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {rows} | {before:.1f} | {after:.1f} | {before / after:.1f}x |")
    print(f"\n{folder.name}, {options.dtype}, medians of {options.rounds} rounds. {processor()}.")


if __name__ == "__main__":
    main()
