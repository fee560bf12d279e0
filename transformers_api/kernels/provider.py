"""Where a process has its kernels from. Nobody waits for the compiler."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import (
    NativeUnavailable,
    build,
    check_processor,
    find,
    find_compiler,
)
from transformers_api.kernels.cpu import usable_cores

log = logging.getLogger(__name__)


class Provision:
    """The kernels in ``cache``; where they are not, the compiler is started once and left alone.

    ``library`` is for one thread, the others are for any.
    """

    def __init__(self, cache: Path, threads: int) -> None:
        self._cache = cache
        self._threads = threads
        self._library: Library | None = None
        self._is_hopeless = False
        self.why_not = "the native kernels are being compiled"
        self._compiling: threading.Thread | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._is_compiled = False

    def library(self, wait: bool = False) -> Library | None:
        """The kernels; None while they are compiled, or for good, with one line in the log.

        ``wait``: for the compiler, if that is what they wait for.
        """
        if self._library is None and not self._is_hopeless:
            try:
                self._look()
                if wait and self._library is None and self._compiling is not None:
                    self._compiling.join()
                    self._look()
            except (NativeUnavailable, OSError) as error:
                self._give_up(error)
        return self._library

    def when_compiled(self, callback: Callable[[], None]) -> bool:
        """Call back once, from any thread, when the compiler is done; False: nothing is coming."""
        with self._lock:
            if self._compiling is None or self._is_hopeless:
                return False
            if not self._is_compiled:
                self._callbacks.append(callback)
                return True
        callback()
        return True

    def _look(self) -> None:
        check_processor()
        if path := find(self._cache):
            self._library = Library(path, self._threads)
        elif self._compiling is None:
            find_compiler()
            log.info("Compiling native kernels; until they are there inference is slower")
            self._compiling = threading.Thread(target=self._compile, name="compiler", daemon=True)
            self._compiling.start()

    def _compile(self) -> None:
        try:
            build(self._cache)
        except NativeUnavailable as error:
            self._give_up(error)
            return
        with self._lock:
            self._is_compiled, callbacks = True, self._callbacks
        for callback in callbacks:
            callback()

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            self._is_hopeless = True
            self.why_not = f"no native kernels: {error}"
        log.warning("No native kernels, so inference is slower: %s", error)


@functools.cache
def provision(cache: Path, threads: int | None) -> Provision:
    """The one of this process; ``threads`` None: as many as can run at once."""
    return Provision(cache, threads or usable_cores())
