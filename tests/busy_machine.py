"""How much longer things take while others use the machine, for bounds of slow tests that measure."""

from __future__ import annotations

import os
import time

LOOK_S = 0.2  # of the processor


def slowness() -> float:
    """1 on a quiet machine, n where n programs wait for each core: in the last minute, or now."""
    began, end = time.monotonic(), time.thread_time() + LOOK_S
    while time.thread_time() < end:
        pass
    now = (time.monotonic() - began) / LOOK_S
    return max(1.0, now, os.getloadavg()[0] / (os.cpu_count() or 1))


def allowed(quiet_s: float) -> float:
    """The seconds that may be taken now for what takes less than ``quiet_s`` on a quiet machine."""
    return quiet_s * slowness()
