"""The cost of interventions in decode steps: interleaved medians of one model.

Beside them an engine to which no inspection is attached.

`python -m benchmarks.intervene MODEL_FOLDER --native NATIVE_CACHE`
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy

from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.sequence import Sequence
from transformers_api.engine.thread import EngineThread
from transformers_api.inspection.attachment import Attachment
from transformers_api.inspection.edit_plan import Edit, EditPlan

CONTEXT = 256


def plans(layers: int, width: int) -> dict[str, EditPlan | None]:
    """The cases."""
    vector = numpy.full(width, 1e-3, numpy.float32)

    def plan(*chosen: int, **fields: Any) -> EditPlan:
        own: dict[str, Any] = {"do": "add", "part": "resid", "vector": vector} | fields
        edits = [Edit(layer=layer, positions=((0, None),), **own) for layer in chosen]
        return EditPlan(edits=tuple(edits), identity="benchmark")

    middle = layers // 2
    head: dict[str, Any] = {"do": "scale", "part": "head", "units": (1,), "by": 0.5, "vector": None}
    edge: dict[str, Any] = {"do": "block", "part": "weights", "units": (1,), "keys": ((5, 6),)}
    edge |= {"vector": None}
    return {
        "nothing": None,
        "a vector in one layer": plan(middle),
        "one head": plan(middle, **head),
        "a vector in five layers": plan(*range(middle, middle + 5)),
        "a vector in every layer": plan(*range(layers)),
        "an edge in one layer": plan(middle, **edge),
        "an edge in every layer": plan(*range(layers), **edge),
        "queries of one head": plan(middle, **head | {"part": "q"}),
    }


def sequences(edits: EditPlan | None, rows: int) -> list[Sequence]:
    """Of which the first is edited; each has read ``CONTEXT`` tokens, and reads one more."""
    made = []
    for slot in range(rows):
        request = SequenceRequest(
            list(range(3, CONTEXT + 4)),
            SamplingParams(max_tokens=4),
            edits=None if slot else edits,
        )
        seq = Sequence(
            request, TokenStream(1, print), 0, eos_token_ids=frozenset(), max_model_len=1 << 20
        )
        seq.slot, seq.num_cached = slot, CONTEXT
        made.append(seq)
    return made


def measure(engine: Any, bare: Any, rows: int, steps: int) -> None:
    """Print the medians of one number of rows; ``bare``: the engine without inspection."""
    for each in (engine, bare):
        each.runner.cache.reserve(rows, CONTEXT + 2)
    config = engine.model.config
    cases = {
        name: (engine.runner, sequences(plan, rows))
        for name, plan in plans(config.num_hidden_layers, config.hidden_size).items()
    }
    cases["without inspection"] = bare.runner, sequences(None, rows)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(steps):
        for name, (runner, batch) in cases.items():
            began = time.perf_counter()
            runner.forward(Batch(batch, [1] * rows))
            times[name].append(time.perf_counter() - began)
    base = statistics.median(times["nothing"])
    for name, own in times.items():
        median = statistics.median(own)
        print(
            f"{rows:2} rows, {name:24} {1e3 * median:7.2f} ms {100 * (median / base - 1):+5.1f} %"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--native", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    thread = EngineThread(num_threads=2)
    options = LoadOptions(native=arguments.native)
    attachment = Attachment(slice_tokens=256)

    def run() -> None:
        engine = load_engine(arguments.folder, options, thread, attachment.wrap)
        bare = load_engine(arguments.folder, options, thread)
        for rows in arguments.rows:
            measure(engine, bare, rows, arguments.steps)
        for each in (engine, bare):
            each.close()

    thread.call(run).result()


if __name__ == "__main__":
    main()
