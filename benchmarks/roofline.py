"""How much of the memory's speed one stream gets: bytes of weights read per second of decoding.

    python -m benchmarks.roofline
    python -m benchmarks.roofline --models smollm2 --kinds none --write docs/performance.md
    python -m benchmarks.roofline --models smollm2 --isa avx512_bf16,avx2

In process, one greedy stream, native kernels. The memory's speed is that of all cores reading half
a gigabyte, the better of before and after each round; medians of the rounds. Keys and values, some
percent of the weights at this length, are not counted. ``--isa``: these instruction sets.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

from benchmarks.inside import Inside
from benchmarks.machine import machine, model_folder, read_gb_per_s, today
from benchmarks.pages import table, write_block
from transformers_api.config.settings import Settings
from transformers_api.engine.native.installation import provider
from transformers_api.errors import ApiError
from transformers_api.kernels.abi import Library

ASKED = {"smollm2": 60, "gpt2": 75}  # percent
TOKENS = 96


def one(model: str, kind: str, isa: str, options: argparse.Namespace) -> list[str]:
    """A line of the table."""
    folder, library = model_folder(model, options.scratch), kernels(isa)
    inside = Inside(folder, NATIVE_KERNELS="true", NATIVE_ISA=isa, QUANTIZATION=kind)
    try:
        size = inside.weight_bytes
        inside.step_ms(1, 16)  # what is done once is done before
        reads, speeds, shares = [], [], []
        for _ in range(options.rounds):
            before = inside.on_thread(lambda: read_gb_per_s(library))
            step_ms = inside.step_ms(1, TOKENS)
            reads.append(max(before, inside.on_thread(lambda: read_gb_per_s(library))))
            speeds.append(1000 / step_ms)
            shares.append(100 * size / 1e6 / step_ms / reads[-1])
        speed, share, read = map(statistics.median, (speeds, shares, reads))
    finally:
        inside.close()
    asked = ASKED.get(model)
    return [
        library.isa,
        f"{model}, {inside.dtype if kind == 'none' else kind}",
        f"{speed:.0f}",
        f"{size / 1e6:.0f}",
        f"{size * speed / 1e9:.1f}",
        f"{read:.1f}",
        f"{share:.0f} %",
        f"{asked} %" if asked and kind == "none" else "",
    ]


def kernels(isa: str) -> Library:
    """The kernels that the server has for ``isa``."""
    settings = Settings.from_env()
    kernels = provider(settings.native_cache, settings.torch_threads, isa)
    if (library := kernels.library(wait=True)) is None:
        sys.exit("The native kernels cannot be built here.")
    return library


def kinds(wanted: list[str]) -> list[str]:
    """Those of them that this server has."""
    return (
        wanted
        if "quantization" in vars(Settings())
        else [kind for kind in wanted if kind == "none"]
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="smollm2,gpt2", type=lambda text: text.split(","))
    parser.add_argument("--kinds", default="none,int8,int4", type=lambda text: text.split(","))
    parser.add_argument("--isa", default="auto", type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--write", type=Path, help="a page to write into")
    options = parser.parse_args()
    rows = []
    runs = itertools.product(options.isa, options.models, kinds(options.kinds))
    for isa, model, kind in runs:
        try:
            rows.append(one(model, kind, isa, options))
        except ApiError as refusal:
            rows.append([isa, f"{model}, {kind}: {refusal.message}", *[""] * 6])
        print(" | ".join(rows[-1]), flush=True)
    heads = ["instructions", "model, weights", "tokens/s", "MB per token", "GB/s of weights"]
    text = table([*heads, "memory, GB/s", "share", "asked for"], rows)
    text += f"\n\n{today()}, medians of {options.rounds} rounds. {machine()}."
    print(f"\n{text}")
    if options.write:
        write_block(options.write, "roofline", text)


if __name__ == "__main__":
    main()
