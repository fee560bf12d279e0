"""The descriptors that this process holds, told from those that its other threads open and close.

A number alone would not do: threads of earlier tests read files, too, and one that is open for the
moment of a count is no leak. A leak stays.
"""

import os
import time

WAIT_S = 10.0


def held() -> set[tuple[str, str]]:
    """(number, what it is of) of every descriptor but the one that lists them."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:  # closed since
            continue
    return found


def left_since(before: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that are held now, were not ``before``, and do not go within ten seconds."""
    deadline = time.monotonic() + WAIT_S
    left = held() - before
    while left and time.monotonic() < deadline:
        left &= held()
    return left
