"""The heap of the C library, which keeps what was freed."""

from __future__ import annotations

import ctypes
import sys

_FIGURES = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIGURES)


def used_bytes() -> int:
    """The bytes that are allocated in all threads; 0 where the C library does not tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is None:  # glibc before 2.33, or another
        return 0
    mallinfo.restype = _Mallinfo2
    figures = mallinfo()
    return int(figures.uordblks + figures.hblkhd)


def trim_memory() -> None:
    """Return the pages that the C library keeps for the next allocation."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim:
            trim(0)
