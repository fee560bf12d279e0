"""Imports of what never goes away again: begun early, and not looked through for garbage."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from transformers_api.engine.platform.dataclass_methods import compiled_later

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


class _Shared:
    """A state of the process that lasts while any thread wants it."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context, self._lock, self._count = context, threading.Lock(), 0
        self._entered = ExitStack()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Begin it, where nobody has; end it, where nobody else wants it."""
        with self._lock:
            if not self._count:
                self._entered.enter_context(self._context())
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._entered.close()


@contextmanager
def _collection_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_uncollected, _methods_later = _Shared(_collection_off), _Shared(compiled_later)


def without_collection() -> AbstractContextManager[None]:
    """While it lasts, in any thread, nobody looks for garbage: what is made meanwhile stays."""
    return _uncollected.shared()


@contextmanager
def importing() -> Iterator[None]:
    """The same for imports, whose dataclasses get their methods later: see ``compiled_later``."""
    with _uncollected.shared(), _methods_later.shared():
        yield
