"""The handlers of signals, kept as they are while a library sets its own. From any thread."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT, signal.SIGHUP)
LARGEST_ACTION = 512  # bytes: more than any system's struct sigaction


@contextmanager
def own_handlers() -> Iterator[None]:
    """Give back the handlers of now at the end, also those that Python does not know of.

    Ray's core takes SIGTERM for a crash; a front that gets it has streams to finish.
    """
    libc = ctypes.CDLL(None)
    actions = {number: ctypes.create_string_buffer(LARGEST_ACTION) for number in SIGNALS}
    for number, action in actions.items():
        libc.sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in actions.items():
            libc.sigaction(int(number), action, None)
