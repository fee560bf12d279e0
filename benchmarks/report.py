"""From what `benchmarks/serve.py` measured to its tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import table
from benchmarks.servers import OURS

SHOWN = {"smollm2": "SmolLM2-135M-Instruct", "gpt2": "GPT-2 124M shape, random weights"}
SERVE, SERVE_BATCHING = "transformers serve", "transformers serve --continuous-batching"
VLLM, OPENVINO = "vLLM CPU bf16", "OpenVINO GenAI int8, in process"
WIDTHS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
Figures = dict[str, float]


@dataclass(frozen=True)
class Target:
    """At least (of times: at most) so many times what the best of some others reach."""

    case: str
    against: str
    figure: str
    ours: str  # the weights
    theirs: tuple[str, ...]
    bound: float
    is_time: bool = False

    def ratio(self, known: dict[str, Figures]) -> float | None:
        """Ours over theirs; of times, too. None where one of them was not measured."""
        mine = known.get(f"{OURS} {self.ours}", {}).get(self.figure)
        others = [
            known[name][self.figure] for name in self.theirs if self.figure in known.get(name, {})
        ]
        if not mine or not others:
            return None
        return mine / (min(others) if self.is_time else max(others))

    def holds(self, ratio: float) -> bool:
        """Whether that is enough."""
        return ratio <= self.bound if self.is_time else ratio >= self.bound


def _beside_llama(
    kinds: dict[str, str], case: str, figure: str, bounds: Iterable[float], is_time: bool = False
) -> list[Target]:
    """Targets of pairs, weights of ours to theirs: the same instructions, or the same file."""
    return [
        Target(
            f"{case}, {ours}",
            f"llama-server {kind}",
            figure,
            ours,
            (f"llama-server {kind}",),
            bound,
            is_time,
        )
        for (ours, kind), bound in zip(kinds.items(), bounds, strict=True)
    ]


def _of_variants() -> list[Target]:
    lines = []
    for isa, one, eight, first in (("avx2", 1.0, 1.5, 0.9), ("avx512", 1.1, 1.8, 0.9)):
        kinds = {
            f"{ours} {isa}": f"{kind} {isa}" for ours, kind in WIDTHS.items() if ours != "bf16"
        }
        lines += _beside_llama(kinds, "one stream", "single", (one, one))
        lines += _beside_llama(kinds, "8 streams", "tokens_8", (eight, eight))
        long = "time to first token, 542 tokens"
        lines += _beside_llama(kinds, long, "ttft_long", (first, first), True)
    return lines


def _of_files() -> list[Target]:
    kinds = {kind: kind for kind in ("Q4_0", "Q8_0", "Q4_K_M")}
    same = (1.0, 1.0, 1.0)
    return [
        *_beside_llama(kinds, "one stream", "single", (1.5, 1.2, 1.3)),
        *_beside_llama(kinds, "8 streams", "tokens_8", (2.5, 2.5, 2.5)),
        *_beside_llama(
            kinds, "time to first token, 542 tokens", "ttft_long", [0.75 * x for x in same], True
        ),
        *_beside_llama(
            kinds, "process start to first token", "start_s", [1.2 * x for x in same], True
        ),
        *_beside_llama(kinds, "peak memory", "memory_mb", [1.1 * x for x in same], True),
    ]


BOTH = (SERVE, SERVE_BATCHING)
TARGETS = (
    Target("one stream, bf16", SERVE, "single", "bf16", BOTH, 4),
    Target("one stream, int8", SERVE, "single", "int8", BOTH, 6),
    Target("16 streams, bf16", f"{SERVE}, its better mode", "tokens_16", "bf16", BOTH, 5),
    Target("16 streams, bf16", f"{SERVE}, its default mode", "tokens_16", "bf16", (SERVE,), 20),
    *_beside_llama(WIDTHS, "one stream", "single", (1.0, 1.2, 1.1)),
    *_beside_llama(WIDTHS, "8 streams", "tokens_8", (2, 2, 2)),
    *_beside_llama(WIDTHS, "32 streams", "tokens_32", (2, 2, 2)),
    Target("one stream, bf16", VLLM, "single", "bf16", (VLLM,), 2),
    Target("32 streams, bf16", VLLM, "tokens_32", "bf16", (VLLM,), 1.5),
    Target("32 streams, int8", OPENVINO, "tokens_32", "int8", (OPENVINO,), 1),
    *_beside_llama(
        WIDTHS, "time to first token, 542 tokens", "ttft_long", (0.75, 0.75, 0.75), is_time=True
    ),
    Target("process start to first token", SERVE, "start_s", "bf16", (SERVE,), 0.5, is_time=True),
    *_of_variants(),
    *_of_files(),
)
QUOTED = (
    ("one stream, bf16", SERVE),
    ("32 streams, bf16", "llama-server BF16"),
    ("one stream, bf16", "llama-server BF16"),
)


def medians(known: dict[str, Any], model: str) -> dict[str, Figures]:
    """Name to the median of every figure over the rounds, in the order of their turns."""
    rounds: dict[str, list[Figures]] = {}
    for turn in known["turns"]:
        if turn["model"] == model and "figures" in turn:
            rounds.setdefault(turn["name"], []).append(turn["figures"])
    return {
        name: {
            figure: statistics.median(each[figure] for each in turns if figure in each)
            for figure in {figure: None for each in turns for figure in each}
        }
        for name, turns in rounds.items()
    }


def report(known: dict[str, Any]) -> str:
    """Everything, as Markdown."""
    models = list(dict.fromkeys(turn["model"] for turn in known["turns"]))
    parts = [one_model(known, model) for model in models] or ["Nothing was measured."]
    return "\n\n".join([*parts, conditions(known)])


def one_model(known: dict[str, Any], model: str) -> str:
    """Both tables of one model, and who failed."""
    found = medians(known, model)
    shown = SHOWN.get(model, Path(model).name)
    parts = [f"### {shown}", figures_table(found, known["about"]["streams"])]
    if compared := [row for target in TARGETS if (row := target_row(target, found))]:
        heads = ["case, ours", "against", "asked for", "reached", "holds"]
        parts.append(table(heads, compared))
    parts += [
        f"{turn['name']} was not measured: {turn['error']}"
        for turn in known["turns"]
        if turn["model"] == model and "error" in turn
    ]
    return "\n\n".join(parts)


def figures_table(found: dict[str, Figures], streams: list[int]) -> str:
    """One line for each server."""
    columns: list[tuple[str, Callable[[Figures], str]]] = [
        ("one stream, tokens/s (62 / 542 before)", _pair("single", "single_long", ".1f")),
        ("first token, ms (62 / 542)", _pair("ttft", "ttft_long", ".0f")),
        *((f"{n} streams, tokens/s", _one(f"tokens_{n}", ".0f")) for n in streams),
        (f"p95 / median gap, {streams[-1]}", _one(f"tail_{streams[-1]}", ".2f")),
        ("peak memory, MB", _one("memory_mb", ".0f")),
        ("start to first token, s", _one("start_s", ".1f")),
    ]
    rows = [[name, *(cell(figures) for _, cell in columns)] for name, figures in found.items()]
    return table(["server", *(head for head, _ in columns)], rows)


def _one(name: str, form: str) -> Callable[[Figures], str]:
    return lambda figures: format(figures[name], form) if name in figures else "-"


def _pair(first: str, second: str, form: str) -> Callable[[Figures], str]:
    return lambda figures: f"{_one(first, form)(figures)} / {_one(second, form)(figures)}"


def target_row(target: Target, found: dict[str, Figures]) -> list[str] | None:
    """A line of the second table; None where something lacks."""
    ratio = target.ratio(found)
    if ratio is None:
        return None
    asked = f"{target.bound:g}x" + (" its time" if target.is_time else "")
    return [
        target.case,
        target.against,
        asked,
        f"{ratio:.2f}x",
        "yes" if target.holds(ratio) else "no",
    ]


def quoted(known: dict[str, Any]) -> str:
    """The three lines of the README."""
    model = known["turns"][0]["model"]
    found = medians(known, model)
    rows = []
    for case, against in QUOTED:
        target = next(t for t in TARGETS if (t.case, t.against) == (case, against))
        ratio = target.ratio(found)
        if ratio is not None:
            mine = found[f"{OURS} {target.ours}"][target.figure]
            rows.append([target.case, target.against, f"{mine:.0f}", f"{ratio:.1f}x"])
    heads = ["case", "against", "ours, tokens/s", "ours / theirs"]
    about = known["about"]
    return (
        f"{table(heads, rows)}\n\n{SHOWN.get(model, model)}, {about['date']}. {about['machine']}."
    )


def conditions(known: dict[str, Any]) -> str:
    """What the figures hold for: machine, versions, lengths."""
    about = known["about"]
    lengths = sorted(
        {
            round(turn["figures"][name])
            for turn in known["turns"]
            for name in ("prompt", "prompt_long")
            if name in turn.get("figures", {})
        }
    )
    peers = ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    return (
        f"{about['date']}, `{about['command']}`: medians of {about['rounds']} rounds, answers of "
        f"{about['max_tokens']} tokens, prompts of {', '.join(map(str, lengths))} tokens. "
        f"{about['machine']}. Peers: {peers or 'none'}."
    )
