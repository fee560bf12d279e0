"""What tracing costs a decode step, and how many bytes a token's trace takes.

    python -m benchmarks.trace --folder FOLDER

One engine, the same sequences; what is noted changes from step to step, so that all cases meet the
same moments of the machine. Medians, and their ratio to a step without a trace.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.machine import default_model_folder, processor
from transformers_api.api.http import strict_json
from transformers_api.api.trace.format import step
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.thread import EngineThread
from transformers_api.inspection.attachment import Attachment
from transformers_api.inspection.base import Anatomy, StepTrace, TracePlan
from transformers_api.serving.inspect.trace_plan import AttentionFormat, TraceRequest
from transformers_api.serving.text.vocabulary import Vocabulary

FORMATS: tuple[AttentionFormat, ...] = ("json", "f16", "u8", "topk")
TURNS = 4  # steps of one case in a row; the first of them is not counted


@dataclass(frozen=True)
class Case:
    """What is noted in a step, for how many of the sequences."""

    name: str
    plan: TracePlan | None = None
    traced: int = 0


def cases(anatomy: Anatomy, rows: int) -> list[Case]:
    """Without a trace first."""
    middle = anatomy.layers_with_attention[len(anatomy.layers_with_attention) // 2]
    one = TracePlan(topk=5, layers=(middle,))
    every = replace(one, layers=tuple(anatomy.layers_with_attention))
    found = [
        Case("no trace"),
        Case("numbers and 5 tokens, no attention", TracePlan(topk=5), 1),
        Case("one layer", one, 1),
        Case("all layers", every, 1),
    ]
    if rows > 1:
        found += [Case("one layer, all sequences", one, rows)]
    return found


class Bench:
    """An engine whose steps are made by hand, on its own thread."""

    def __init__(
        self, folder: Path, dtype: str, rows: int, context: int, native: Path | None
    ) -> None:
        self.native = native
        self.thread = EngineThread()
        self.engine, self.anatomy = self.thread.call(lambda: self._load(folder, dtype)).result()
        self.rows = rows
        self.context = context

    def _load(self, folder: Path, dtype: str) -> tuple[BatchingEngine, Anatomy]:
        attachment = Attachment(slice_tokens=256)
        options = LoadOptions(dtype=dtype, num_slots=16, kv_cache_bytes=1 << 31, native=self.native)
        engine = load_engine(folder, options, self.thread, attachment.wrap)
        self.thread.engines.remove(engine)  # nobody steps it but we
        assert attachment.examined is not None
        return engine, attachment.examined.anatomy

    def times(self, steps: int) -> dict[str, list[float]]:
        """Seconds of every step, by case."""
        return self.thread.call(lambda: self._times(steps)).result()

    def _times(self, steps: int) -> dict[str, list[float]]:
        engine, wanted = self.engine, cases(self.anatomy, self.rows)
        total = steps * TURNS * len(wanted)
        params = SamplingParams(max_tokens=total + 8, temperature=0, ignore_eos=True)
        prompts = [[10 + row, *range(20, 20 + self.context - 1)] for row in range(self.rows)]
        sequences = [
            engine._sequence(SequenceRequest(prompt, params), _Nobody(), index, {})
            for index, prompt in enumerate(prompts)
        ]
        engine._add(sequences)
        while any(seq.is_prefilling for seq in sequences):
            engine.step()
        times: dict[str, list[float]] = {case.name: [] for case in wanted}
        for turn in range(steps):
            for case in wanted[turn % len(wanted) :] + wanted[: turn % len(wanted)]:
                for index, seq in enumerate(sequences):
                    is_traced = case.plan is not None and index < case.traced
                    seq.observe = {"trace": case.plan} if is_traced else {}
                for place in range(TURNS):
                    began = time.perf_counter()
                    engine.step()
                    if place:
                        times[case.name].append(time.perf_counter() - began)
        for seq in sequences:
            seq.cancelled = True
        engine.step()
        return times

    def sizes(self, tokenizer: Any, layers: int) -> dict[str, int]:
        """Bytes of JSON of one token's trace at this context, by format."""
        chosen = tuple(self.anatomy.layers_with_attention[:layers])
        words = Vocabulary(tokenizer)
        found = {}
        for name in FORMATS:
            plan = TracePlan(topk=5, layers=chosen, attn_topk=16 if name == "topk" else 0)
            asked = TraceRequest(layers=chosen, attn=name, topk=5)
            trace = self.thread.call(lambda plan=plan: self._one(plan)).result()
            found[name] = len(strict_json.dump(step(trace, 0, asked, words)))
        return found

    def _one(self, plan: TracePlan) -> StepTrace:
        kept = _Keeper()
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        request = SequenceRequest(list(range(20, 20 + self.context)), params)
        seq = self.engine._sequence(request, kept, 0, {"trace": plan})
        self.engine._add([seq])
        while not seq.is_finished:
            self.engine.step()
        return kept.traces[-1]

    def close(self) -> None:
        """End the engine."""
        self.engine.close()
        self.thread.stop()


class _Nobody:
    """A stream that nobody reads."""

    is_overfull = False

    def put(self, output: Any) -> None:
        """Let it go."""


class _Keeper(_Nobody):
    def __init__(self) -> None:
        self.traces: list[StepTrace] = []

    def put(self, output: Any) -> None:
        """Keep the trace."""
        if "trace" in output.extras:
            self.traces.append(output.extras["trace"])


def table(times: Mapping[str, list[float]]) -> list[str]:
    """Rows of Markdown."""
    base = statistics.median(times["no trace"])
    rows = []
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        change = f"{100 * (middle / base - 1):+.1f} %" if name != "no trace" else ""
        rows.append(f"| {name} | {1000 * middle:.2f} | {change} |")
    return rows


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="a model in the transformers format")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--native", type=Path, help="with native kernels, compiled into there")
    parser.add_argument("--steps", type=int, default=40, help="turns of each case")
    parser.add_argument("--rows", default="1,4")
    parser.add_argument("--context", type=int, default=256)
    options = parser.parse_args()
    folder = options.folder or default_model_folder()
    sizes: list[dict[str, int]] = []
    for rows in (int(part) for part in options.rows.split(",")):
        bench = Bench(folder, options.dtype, rows, options.context, options.native)
        print(f"\n{rows} sequence{'s' if rows > 1 else ''}, one of them traced\n")
        print("| noted | step, ms | |\n| --- | ---: | ---: |")
        print("\n".join(table(bench.times(options.steps))))
        if not sizes:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            sizes = [bench.sizes(tokenizer, layers) for layers in (0, 1, 4)]
        bench.close()
    print(f"\nBytes of one token's trace with {options.context} tokens before it\n")
    print("| attn | no attention | one layer | four layers |\n| --- | ---: | ---: | ---: |")
    for name in FORMATS:
        print(f"| {name} | " + " | ".join(f"{each[name]:,}" for each in sizes) + " |")
    print(f"\n{folder.name}, {bench.anatomy.dtype}, {options.steps} turns. {processor()}.")


if __name__ == "__main__":
    main()
