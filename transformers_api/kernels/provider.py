"""The source of a process's kernels: a compiled library, or the compiler in the background."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_api.kernels.build import LibraryRefused, build, find, find_compiler
from transformers_api.kernels.variants import NativeUnavailable, Variant, choose

if TYPE_CHECKING:
    from transformers_api.kernels.abi import Library

log = logging.getLogger(__name__)


class KernelProvider:
    """The kernels in ``cache``; where none can be used, the compiler is started once.

    ``isa``: the instruction set that they are compiled for, "auto" for the best of this processor.
    ``library`` is for one thread, the others are for any. ``why_not``: the reason while there is no
    library. ``outcomes``: runs of the compiler that "succeeded" and "failed".
    """

    def __init__(self, cache: Path, threads: int, isa: str = "auto") -> None:
        self.why_not = "the native kernels are being compiled"
        self.outcomes = {"succeeded": 0, "failed": 0}
        self._cache = cache
        self._threads = threads
        self._isa = isa
        self._library: Library | None = None
        self._has_failed = False
        self._compiler: threading.Thread | None = None
        self._is_compiled = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def library(self, wait: bool = False) -> Library | None:
        """The kernels; None while they are compiled, or for good, with one line in the log.

        ``wait``: until the compiler is done, if it is running.
        """
        if self._library is None and not self._has_failed:
            try:
                self._advance()
                if wait and self._library is None and self._compiler is not None:
                    self._compiler.join()
                    self._advance()
            except (NativeUnavailable, OSError) as error:
                self._give_up(error)
        return self._library

    def when_compiled(self, callback: Callable[[], None]) -> bool:
        """Call back once, from any thread, when the compiler is done; False if none is running."""
        with self._lock:
            if self._compiler is None or self._has_failed:
                return False
            if not self._is_compiled:
                self._callbacks.append(callback)
                return True
        callback()
        return True

    def _advance(self) -> None:
        variant = choose(self._isa)
        path = find(self._cache, variant)
        if self._compiler is not None:
            if self._is_compiled and path:
                self._open(path, variant)
            return
        try:
            if path:
                self._open(path, variant)
                return
        except LibraryRefused as refusal:
            log.warning("The compiled library %s is not used: %s", path, refusal)
        find_compiler()
        log.info("Compiling native kernels; until they are there inference is slower")
        self._compiler = threading.Thread(
            target=self._compile, args=(variant, path is not None), name="compiler", daemon=True
        )
        self._compiler.start()

    def _open(self, path: Path, variant: Variant) -> None:
        from transformers_api.kernels.abi import Library  # torch, which few callers need

        self._library = Library(path, self._threads, variant.name)

    def _compile(self, variant: Variant, replace: bool) -> None:
        try:
            build(self._cache, replace=replace, outcomes=self.outcomes, variant=variant)
        except NativeUnavailable as error:
            self._give_up(error)
            return
        with self._lock:
            self._is_compiled, callbacks = True, self._callbacks
        for callback in callbacks:
            callback()

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            self._has_failed = True
            self.why_not = f"no native kernels: {error}"
        log.warning("No native kernels, so inference is slower: %s", error)


@functools.cache
def kernel_provider(cache: Path, threads: int, isa: str = "auto") -> KernelProvider:
    """The provider of this process."""
    return KernelProvider(cache, threads, isa)
