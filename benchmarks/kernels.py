"""The native kernels beside what torch offers, at the shapes of two small models, taking turns.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --models gpt2 --rows 1,8 --busy

Each cell is the median of the rounds. Linear layers: all of a forward pass over ROWS tokens, the
output layer included; GB/s counts the bytes of the weights. ``--busy`` lets another process occupy
one core meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import busy_core, processor, read_gb_per_s
from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.attention import CausalRows, describing, native_attention
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory
from transformers_api.kernels.provider import KernelProvider

Call = Callable[[], object]


@dataclass(frozen=True)
class Shapes:
    """The matrices (out, in) that a token passes, and the attention of a layer."""

    layers: int
    joined: list[tuple[int, int]]  # per layer, those with one input as one
    head: tuple[int, int]
    heads: int
    kv_heads: int
    size: int = 64

    @property
    def all(self) -> list[tuple[int, int]]:
        """In the order of their use."""
        return self.joined * self.layers + [self.head]


MODELS = {
    "smollm2-135m": Shapes(
        30, [(960, 576), (576, 576), (3072, 576), (576, 1536)], (49152, 576), 9, 3
    ),
    "gpt2": Shapes(12, [(2304, 768), (768, 768), (3072, 768), (768, 3072)], (50257, 768), 12, 12),
}


def take_turns(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """The median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


class Products:
    """All linear layers of a model, in one form after the other."""

    def __init__(self, shapes: Shapes, library: Library, kinds: list[str]) -> None:
        weights = [torch.randn(shape) * 0.05 for shape in shapes.all]
        self.count = sum(weight.numel() for weight in weights)
        self.packed = {}
        for kind in kinds:
            memory = WeightMemory()
            self.packed[kind] = [PackedWeight(library, [w], kind, memory) for w in weights]
        self.half = [weight.bfloat16() for weight in weights]
        del weights
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.reordered = [reorder(weight, None) for weight in self.half]

    def calls(self, rows: int) -> dict[str, Call]:
        """What to measure, by name."""
        x = {k: torch.randn(rows, k) for _, k in {tuple(w.shape) for w in self.half}}
        half = {k: value.bfloat16() for k, value in x.items()}
        pointwise = torch.ops.mkldnn._linear_pointwise

        def native(kind: str) -> Call:
            return lambda: [w.multiply(x[w.in_features]) for w in self.packed[kind]]

        return {
            "F.linear bf16": lambda: [F.linear(half[w.shape[1]], w) for w in self.half],
            "oneDNN packed bf16": lambda: [
                pointwise(half[w.shape[1]], packed, None, "none", [], "")
                for w, packed in zip(self.half, self.reordered, strict=True)
            ],
        } | {f"native {kind}": native(kind) for kind in self.packed}

    def weight_bytes(self, name: str) -> int:
        """Bytes that a call reads."""
        kind = name.removeprefix("native ")
        return sum(w.nbytes for w in self.packed[kind]) if kind != name else 2 * self.count


def print_products(products: Products, rows: list[int], rounds: int) -> None:
    """One table of linear layers."""
    print(
        "\n| rows | kernel | ms | GB/s of weights | GFLOP/s |\n| ---: | --- | ---: | ---: | ---: |"
    )
    for count in rows:
        taken = take_turns(products.calls(count), rounds if count < 64 else 3)
        for name, seconds in taken.items():
            gigabytes = products.weight_bytes(name) / seconds / 1e9
            flops = 2e-9 * count * products.count / seconds
            print(f"| {count} | {name} | {1000 * seconds:.2f} | {gigabytes:.1f} | {flops:.0f} |")


def attention_calls(
    library: Library, shapes: Shapes, rows: int, width: int, seen: int
) -> dict[str, Call]:
    """The kernel and SDPA, keys in both dtypes; the queries are the last ``width`` of ``seen``."""
    query = torch.randn(rows, width, shapes.heads, shapes.size).transpose(1, 2)
    starts = torch.full((rows,), seen - width)
    visible = torch.arange(seen) <= (seen - width + torch.arange(width))[:, None]
    mask, causal = visible.expand(rows, 1, width, seen), CausalRows(library, starts, 0)
    calls: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16):
        cache = torch.randn(2, rows, shapes.kv_heads, 2 * seen, shapes.size, dtype=dtype)
        key, value = cache[0][:, :, :seen], cache[1][:, :, :seen]
        name = str(dtype).removeprefix("torch.")
        calls[f"SDPA {name}"] = sdpa(query.to(dtype), key, value, mask)
        calls[f"native {name}"] = native(query, key, value, mask, causal)
    return calls


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Call:
    """Torch's own attention."""
    return lambda: F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rows: CausalRows) -> Call:
    """The kernel, with what Python adds to it."""
    module = torch.nn.Module()

    def call() -> object:
        with describing([(mask, rows)]):
            return native_attention(module, query, key, value, mask)

    return call


def print_attention(library: Library, shapes: Shapes, rounds: int) -> None:
    """One table of attention in one layer."""
    cases = [(1, 1, 64), (1, 1, 512), (8, 1, 256), (32, 1, 256), (1, 256, 256), (1, 256, 512)]
    names: list[str] = []
    for rows, width, seen in cases:
        taken = take_turns(attention_calls(library, shapes, rows, width, seen), 5 * rounds)
        if not names:
            names = list(taken)
            print(f"\n| rows | tokens | context | {', µs | '.join(names)}, µs |")
            print("| ---: " * (3 + len(names)) + "|")
        cells = " | ".join(f"{1e6 * taken[name]:.0f}" for name in names)
        print(f"| {rows} | {width} | {seen} | {cells} |")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default="1,8,32,256")
    parser.add_argument("--kinds", default="float32,bfloat16,int8,int4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", default="auto", help="the instruction set: NATIVE_ISA")
    parser.add_argument("--busy", action="store_true", help="with another process on one core")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        library = KernelProvider(Path(cache), options.threads, options.isa).library(wait=True)
        if library is None:
            sys.exit("The native kernels cannot be built here.")
        if options.busy:
            stack.enter_context(busy_core())
        for name in options.models.split(","):
            shapes = MODELS[name]
            print(f"\n### {name}\n\nMemory is read at {read_gb_per_s(library):.1f} GB/s.")
            products = Products(shapes, library, options.kinds.split(","))
            print_products(
                products, [int(rows) for rows in options.rows.split(",")], options.rounds
            )
            print_attention(library, shapes, options.rounds)
    print(f"\nMedians, {options.threads} threads, torch {torch.__version__}. {processor()}.")


if __name__ == "__main__":
    main()
