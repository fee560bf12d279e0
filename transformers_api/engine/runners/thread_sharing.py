"""Fewer threads for torch while others need the cores.

torch's threads share every product and wait for each other by spinning, some hundred times in a
pass. Where another program has one of their cores, all wait for the one that does not run; and
where the system puts two of them on one core, each spins away the time in which the other could
have finished, and a pass takes five to thirty times as long. One thread less is faster than either.
To try another one costs such a pass, which may be seconds: nobody does while no core is ever idle.
Linux tells how long threads wait for a core, and cores for threads; elsewhere nothing changes.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.engine.scheduler import SlotStore

WINDOW_S = 0.1  # of computing, after which it is decided anew
CROWDED = 0.4  # seconds that threads wait for a core, all together, in a second of computing
FREE = 0.7  # seconds that cores have nothing to do: room for another thread
PARTLY_FREE = 0.3  # perhaps
PAUSE_S, LONGEST_PAUSE_S = 2.0, 16.0  # until it is tried anyway; doubled in vain
TASKS, CORES = Path("/proc/self/task"), Path("/proc/stat")


class SharingRunner:
    """Wraps a runner that computes with torch's threads, and sets their number; see the module."""

    def __init__(
        self,
        inner: Runner,
        clock: Callable[[], float] = time.monotonic,
        waits: Callable[[], dict[str, float]] | None = None,
        idle: Callable[[], float] | None = None,
    ) -> None:
        self.inner = inner
        self._clock = clock
        self._waits, self._idle = waits or thread_waits, idle or idle_s
        self._most = torch.get_num_threads()
        self._pause, self._retry_at = PAUSE_S, 0.0
        self._begin()

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
            self._decide()
            self._begin()
        return logits

    def clear(self) -> None:
        """See Runner."""
        self.inner.clear()

    def _begin(self) -> None:
        self._computed, self._began = 0.0, self._clock()
        self._before, self._idle_before = self._waits(), self._idle()

    def _decide(self) -> None:
        before, after, now = self._before, self._waits(), self._clock()
        waited = sum(after[task] - before[task] for task in before.keys() & after.keys())
        threads = torch.get_num_threads()
        ours = threads * (now - self._began - self._computed)  # while there was nothing to compute
        idle = (self._idle() - self._idle_before - ours) / self._computed
        if threads > 1 and waited > CROWDED * self._computed:
            torch.set_num_threads(threads - 1)
            self._retry_at = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        elif threads == self._most:
            self._pause = PAUSE_S
        elif idle > FREE or (now >= self._retry_at and not idle < PARTLY_FREE):
            torch.set_num_threads(threads + 1)


def thread_waits() -> dict[str, float]:
    """Seconds that this thread and those of libraries have so far waited for a core, by task."""
    others = {str(each.native_id) for each in threading.enumerate()}
    others.discard(str(threading.get_native_id()))
    waits = {}
    try:
        for task in TASKS.iterdir():
            if task.name not in others:
                waits[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    except OSError:  # a thread has ended meanwhile, or Linux does not tell
        return {}
    return waits


def idle_s() -> float:
    """Seconds that the cores which we may use have so far had nothing to do, all together.

    NaN where the system does not tell.
    """
    try:
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = (line.split() for line in CORES.read_text().splitlines())
        ticks = sum(int(words[4]) for words in lines if words[0] in ours)
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        return math.nan
