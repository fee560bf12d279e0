"""Fewer threads for torch while others need the cores.

torch's threads share every product and wait for each other by spinning, some hundred times in a
pass. Where another program has one of their cores, all wait for the one that does not run; and
where the system puts two of them on one core, each spins away the time in which the other could
have finished, and a pass takes five to thirty times as long. One thread less is faster than either.
How long threads wait for a core is told by Linux; elsewhere nothing changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from transformers_api.engine.model_runner import Runner
from transformers_api.engine.scheduler import Batch, SlotStore

WINDOW_S = 0.1  # of computing, after which it is decided anew
CROWDED = 0.4  # seconds that threads wait for a core, all together, in a second of computing
PAUSE_S, LONGEST_PAUSE_S = 1.0, 16.0  # until another thread is tried; doubled in vain
TASKS = Path("/proc/self/task")


class SharingRunner:
    """Wraps a runner that computes with torch's threads, and sets their number; see the module."""

    def __init__(
        self,
        inner: Runner,
        clock: Callable[[], float] = time.monotonic,
        waits: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.inner = inner
        self._clock = clock
        self._waits = waits or thread_waits
        self._most = torch.get_num_threads()
        self._pause, self._retry_at = PAUSE_S, 0.0
        self._computed, self._before = 0.0, self._waits()

    @property
    def cache(self) -> SlotStore:
        """The inner runner's."""
        return self.inner.cache

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        began = self._clock()
        logits = self.inner.forward(batch, keep)
        self._computed += self._clock() - began
        if self._computed >= WINDOW_S:
            after = self._waits()
            self._decide(after)
            self._computed, self._before = 0.0, after
        return logits

    def clear(self) -> None:
        """See Runner."""
        self.inner.clear()

    def _decide(self, after: dict[str, float]) -> None:
        before, now, threads = self._before, self._clock(), torch.get_num_threads()
        waited = sum(after[task] - before[task] for task in before.keys() & after.keys())
        if threads > 1 and waited > CROWDED * self._computed:
            torch.set_num_threads(threads - 1)
            self._retry_at = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        elif threads == self._most:
            self._pause = PAUSE_S
        elif now >= self._retry_at:
            torch.set_num_threads(threads + 1)


def thread_waits() -> dict[str, float]:
    """Seconds that this thread and those of libraries have so far waited for a core, by task."""
    others = {str(each.native_id) for each in threading.enumerate()}
    others.discard(str(threading.get_native_id()))
    found = {}
    try:
        for task in TASKS.iterdir():
            if task.name not in others:
                found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    except OSError:  # a thread has ended meanwhile, or Linux does not tell
        return {}
    return found
