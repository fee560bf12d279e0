"""A file in the address space of this process, whose memory is given back as one goes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """A file as it is now; one that has changed is not read any more.

    What is read of it stays in memory until ``release``. Raises OSError for a file that cannot be
    read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path.stat())
        self._pages: mmap.mmap | None = None

    @property
    def bytes(self) -> Tensor:
        """All its bytes. Raises OSError where the file has changed since it was opened first."""
        if self._pages is None:
            self._pages = self._mapped()
        return torch.frombuffer(self._pages, dtype=torch.uint8)

    def _mapped(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise OSError(f"{self.path} has changed")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def release(self, offset: int, size: int) -> None:
        """Give the memory of these bytes back; they are read again when they are needed."""
        if self._pages is not None and size and hasattr(mmap, "MADV_DONTNEED"):
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._pages.madvise(mmap.MADV_DONTNEED, start, offset + size - start)

    def close(self) -> None:
        """Let go of the file until ``bytes`` are asked for again."""
        self._pages = None


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
