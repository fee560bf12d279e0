"""Packing on a thread of its own: nobody needs the numbers while a model's passes are recorded."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from torch import Tensor

from transformers_api.kernels.abi import TYPES, Library, Packing, Weight

# What is packed in one call: the thread comes back for the interpreter's lock after it, and gives
# back the pages that were read.
AT_ONCE_BYTES = 64 << 20
MOST_BYTES = 1 << 30  # of a model: who waits for more is told how far it is


class _Part(NamedTuple):
    """One call, the bytes that it reads, and whose memory it reads and writes."""

    call: Packing
    bytes: int
    owners: tuple[object, ...]


class PackingThread:
    """Packs matrices of files, one after the other, until it is told to ``finish``.

    The thread calls nothing of torch, which is the engine thread's.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._bytes = 0
        self._work: SimpleQueue[_Part | Callable[[], None] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="packing", daemon=True)
        self._thread.start()

    def add(self, weight: Weight, row: int, numbers: Tensor, memory: Tensor) -> bool:
        """Pack ``numbers`` (rows, in) as the rows of ``weight`` from ``row`` on, in ``memory``.

        False where they would be too many, or have a format that is not packed as it is.
        """
        if numbers.dtype not in TYPES or self._bytes + numbers.nbytes > MOST_BYTES:
            return False
        self._bytes += numbers.nbytes
        type_number = TYPES[numbers.dtype]
        place = ctypes.addressof(weight), numbers.data_ptr(), row, len(numbers), type_number
        self._work.put(_Part(Packing(*place), numbers.nbytes, (weight, numbers, memory)))
        return True

    def then(self, release: Callable[[], None]) -> None:
        """Call ``release`` when all that was added before has been packed."""
        self._work.put(release)

    def finish(self) -> None:
        """Wait until all that was added has been packed; nothing is added after that.

        Raises what went wrong.
        """
        self._work.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._pack_all()
        except BaseException as error:  # for whoever waits
            self._error = error

    def _pack_all(self) -> None:
        is_last = False
        while not is_last:
            parts: list[_Part] = []
            releases: list[Callable[[], None]] = []
            size, work = 0, self._work.get()
            while work is not None:
                if isinstance(work, _Part):
                    parts.append(work)
                    size += work.bytes
                else:
                    releases.append(work)
                if size >= AT_ONCE_BYTES or self._work.empty():
                    break
                work = self._work.get()
            is_last = work is None
            self._pack(parts)
            for release in releases:
                release()

    def _pack(self, parts: list[_Part]) -> None:
        calls = (Packing * len(parts))(*(part.call for part in parts))
        self._library.without_gil.pack_all(ctypes.addressof(calls), len(parts))
