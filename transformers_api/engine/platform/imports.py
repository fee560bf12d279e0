"""Imports of what never goes away again: begun early, and not looked through for garbage."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Compiled modules that the application imports: whoever needs the linker waits while it is busy.
# Not "_asyncio": imported before asyncio, which it imports, it leaves that without current tasks.
COMPILED = (
    *("asyncio", "_bisect", "_blake2", "_bz2", "_contextvars", "_csv", "_ctypes", "_datetime"),
    *("_decimal", "_hashlib", "_heapq", "_json", "_lzma", "_opcode", "_pickle"),
    *("_posixsubprocess", "_queue", "_random", "_sha512", "_socket", "_ssl", "_struct", "_typing"),
    *("_uuid", "array", "binascii", "fcntl", "math", "mmap", "resource", "select", "unicodedata"),
    *("zlib", "markupsafe._speedups", "numpy", "orjson", "regex._regex", "wrapt", "yaml"),
)


def map_torch() -> None:
    """Let the linker begin with torch's largest library while Python's modules are imported.

    ``import torch`` would hold the interpreter's lock meanwhile, this does not. A failure here
    comes again there, with its reason.
    """
    for name in COMPILED:
        with suppress(ImportError):  # one that another version has not
            importlib.import_module(name)
    spec = importlib.util.find_spec("torch")  # imports nothing
    library = Path((spec and spec.origin) or "").parent / "lib" / "libtorch_cpu.so"
    load = getattr(ctypes.CDLL(None), "dlopen", None)
    if load is not None and library.exists():
        arguments = (os.fsencode(library), os.RTLD_NOW)
        # Waited for at the end of the process: its destructors run into a library half linked.
        threading.Thread(target=load, args=arguments, name="linker").start()


class _Pause:
    """The pause of collection, of all threads that want one at the same time."""

    def __init__(self) -> None:
        self._lock, self._count, self._was_enabled = threading.Lock(), 0, False

    def begin(self) -> None:
        """Pause it, where nobody has."""
        with self._lock:
            if not self._count:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._count += 1

    def end(self) -> None:
        """Go on, where nobody else wants it paused."""
        with self._lock:
            self._count -= 1
            if not self._count and self._was_enabled:
                gc.enable()


_pause = _Pause()


@contextmanager
def without_collection() -> Iterator[None]:
    """While it lasts, in any thread, nobody looks for garbage: what is made meanwhile stays."""
    _pause.begin()
    try:
        yield
    finally:
        _pause.end()
