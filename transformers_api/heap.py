"""The heap of the C library, which keeps what was freed."""

from __future__ import annotations

import ctypes
import sys


def trim_memory() -> None:
    """Return the pages that the C library keeps for the next allocation."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim:
            trim(0)
