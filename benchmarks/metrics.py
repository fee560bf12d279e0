"""What metrics cost: the engine's part of a decode step, and one scrape.

python -m benchmarks.metrics
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers_api.engine.base import EngineListener, SilentEngineListener
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.metrics import Metrics
from transformers_api.serving.swap.residency import SwapperStatus

ROWS = 32


def fastest(function: Callable[[], object], times: int, rounds: int = 7) -> float:
    """Seconds of one call, in the fastest of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(times):
            function()
        best = min(best, (time.perf_counter() - began) / times)
    return best


def step_s(listener: EngineListener) -> float:
    """Seconds that a decode step of 32 sequences takes to note its times and tell them."""
    now = time.monotonic()
    rows = [SimpleNamespace(token_at=now, first_token_at=now) for _ in range(ROWS)]
    batch: Any = SimpleNamespace(sequences=rows, width=1, draft=[], reaches_end=True)
    engine: Any = SimpleNamespace(listener=listener)
    return fastest(lambda: BatchingEngine._tell(engine, batch, 0, False), 5000)


def main() -> None:
    """Print the figures."""
    metrics = Metrics(["m"])
    metrics.watch(lambda: SwapperStatus(state="ready", model="m"), lambda: (True, ""), lambda: 0)
    silent, counted = step_s(SilentEngineListener()), step_s(metrics.engine("m"))
    page = fastest(metrics.page, 20)
    sys.stdout.write(
        f"a decode step of {ROWS} sequences: {1e6 * counted:.1f} us with metrics, "
        f"{1e6 * silent:.1f} us without; a scrape: {1e3 * page:.1f} ms\n"
    )


if __name__ == "__main__":
    main()
