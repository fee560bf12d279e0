"""A tensor in a safetensors file, and its rows, where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_api.checkpoints.headers.safetensors_file import DTYPES
from transformers_api.checkpoints.headers.safetensors_file import Tensor as Entry
from transformers_api.engine.mapped_file import MappedFile
from transformers_api.engine.stored_weights import StoredRows

PLAIN = ("F32", "F16", "BF16")  # types whose names are ggml's, too
AT_ONCE = 16 << 20  # numbers that are copied before their pages are given back


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file."""

    file: MappedFile
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.entry.shape

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.entry.bytes

    @property
    def type(self) -> str:
        """Its format, in safetensors' word."""
        return self.entry.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The format of its numbers."""
        dtype: torch.dtype = getattr(torch, DTYPES[self.entry.dtype][1])
        return dtype

    def view(self) -> Tensor:
        """The tensor, in the memory of the file."""
        first = self.entry.offset
        memory = self.file.bytes[first : first + self.entry.bytes]
        if first % self.dtype.itemsize:  # no number may begin there
            memory = memory.clone()
        return memory.view(self.dtype).view(self.shape)

    def release(self) -> None:
        """See MappedFile."""
        self.file.release(self.entry.offset, self.entry.bytes)

    def copied(self, dtype: torch.dtype) -> Tensor:
        """The tensor in memory of its own."""
        numbers = self.view().view(-1)
        made = torch.empty(numbers.shape, dtype=dtype)
        for first in range(0, len(numbers), AT_ONCE):
            made[first : first + AT_ONCE] = numbers[first : first + AT_ONCE]
            self.release()
        return made.view(self.shape)

    def matrix(
        self, index: int | None, *, dtype: torch.dtype, is_transposed: bool = False
    ) -> StoredRows:
        """The rows of the tensor, or of one of the matrices in it."""
        return PlainRows(self, dtype, is_transposed, index)


@dataclass(frozen=True)
class PlainRows:
    """Meets StoredRows: a tensor's numbers, or those of one of the matrices in it."""

    tensor: FileTensor
    dtype: torch.dtype  # of the model
    is_transposed: bool = False
    index: int | None = None
    kind: str | None = None
    width: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """See StoredRows."""
        rows, columns = self.tensor.shape[-2:]
        return (columns, rows) if self.is_transposed else (rows, columns)

    def _matrix(self) -> Tensor:
        tensor = self.tensor.view()
        matrix = tensor if self.index is None else tensor[self.index]
        return matrix.t() if self.is_transposed else matrix

    def rows(self, first: int, count: int) -> Tensor:
        """See StoredRows. Rows are read one after the other: those before are given back."""
        if not self.is_transposed:
            start, size = self._place()
            self.tensor.file.release(start, size // self.shape[0] * first)
        return self._matrix()[first : first + count].to(self.dtype)

    def gather(self, indices: Tensor) -> Tensor:
        """See StoredRows."""
        return self._matrix()[indices].to(self.dtype)

    def blocks(self, first: int, count: int) -> Tensor:
        """See StoredRows."""
        raise NotImplementedError

    def lying(self) -> tuple[Tensor, str] | None:
        """See StoredRows."""
        if self.is_transposed or self.dtype != self.tensor.dtype or self.tensor.type not in PLAIN:
            return None
        return self._matrix().reshape(-1).view(torch.uint8), self.tensor.type

    def release(self) -> None:
        """See StoredRows."""
        self.tensor.file.release(*self._place())

    def _place(self) -> tuple[int, int]:
        """The first byte of the matrix in the file, and its bytes."""
        entry = self.tensor.entry
        size = entry.bytes if self.index is None else entry.bytes // entry.shape[0]
        return entry.offset + (self.index or 0) * size, size
