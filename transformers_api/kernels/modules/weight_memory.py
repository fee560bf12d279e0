"""Memory for packed weights, and who packs into it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from transformers_api.heap import trim_memory
from transformers_api.kernels.abi import Library, Weight
from transformers_api.kernels.modules.blocks import Matrix, Pieces
from transformers_api.kernels.modules.packing import PackingThread

BLOCK_BYTES = 128 << 20  # pages come when they are written
HUGE_PAGE = 2 << 20
ALIGNMENT = 64


class OtherWeights(Exception):
    """Weights that were packed before do not fit their model."""


class WeightMemory:
    """An arena for packed weights, allocated in the order in which they are read.

    In huge pages where the system has them: with small ones a core spends a third of its time on
    misses of the translation buffer. A block is freed with the last weight in it.
    """

    is_stored = False  # the weights are in it already
    later: PackingThread | None = None  # packs what is put into it; else it is packed at once

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._has_blocks = False
        self._numbers = torch.empty(0)
        self._count = 0

    def next_number(self) -> int:
        """The number of a weight that is new, from 0."""
        self._count += 1
        return self._count - 1

    def stored(self, number: int, weight: Weight, size: int) -> tuple[Tensor, float] | None:
        """The bytes of a weight that was packed before, and its error; None: it is to be packed.

        Raises OtherWeights where the weight of that number is another one.
        """
        return None

    @contextmanager
    def packing_later(self, library: Library) -> Iterator[Callable[[], None]]:
        """In the block, matrices that lie in files are packed by another thread.

        Gives what waits for them; after it, as after the block, all is packed at once.
        """
        self.later = PackingThread(library)

        def finish() -> None:
            if (later := self.later) is not None:
                self.later = None
                later.finish()

        try:
            yield finish
        finally:
            finish()

    def packs_later(self, weight: Weight, row: int, matrix: Matrix, memory: Tensor) -> bool:
        """Leave ``matrix`` to another thread, where there is one and it can; see PackingThread."""
        whole = _lying(matrix)
        if self.later is None or whole is None:
            return False
        return self.later.add(weight, row, whole, memory)

    def release(self, source: Any, matrix: Matrix) -> None:
        """Release a source whose ``matrix`` has been packed, or is going to be."""
        if self.later is None or _lying(matrix) is None:
            source.release()
        else:
            self.later.then(source.release)

    def numbers(self, rows: int, columns: int) -> Tensor:
        """Float32 of this shape, until the next call: new pages take longer than to fill them."""
        if rows * columns > len(self._numbers):
            self._numbers = torch.empty(rows * columns)
        return self._numbers[: rows * columns].view(rows, columns)

    def take(self, size: int) -> Tensor:
        """``size`` zero bytes, aligned to 64."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if size > len(self._block):
            if self._has_blocks:
                trim_memory()  # of what unpacking has freed since the last block
            self._has_blocks = True
            self._block = _pages(max(size, BLOCK_BYTES))
        memory, self._block = self._block[:size], self._block[size:]
        return memory


def _lying(matrix: Matrix) -> Tensor | None:
    """All of a matrix where it lies in a file, if it does."""
    return matrix.whole if isinstance(matrix, Pieces) else None


def _pages(size: int) -> Tensor:
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(pages, dtype=torch.uint8)
    return block[-block.data_ptr() % HUGE_PAGE :][:size]
