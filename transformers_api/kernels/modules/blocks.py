"""Matrices that lie in files: in the blocks of ggml's types, or read some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_api.kernels.abi import Library

# ggml's numbers of the types whose blocks the kernels read, and the width that loses least: "int4"
# where codes of four bits with a scale and a minimum say all, "int8" for all others.
KINDS = {
    "Q4_0": (2, "int4"),
    "Q4_1": (3, "int4"),
    "Q5_0": (6, "int8"),
    "Q5_1": (7, "int8"),
    "Q8_0": (8, "int8"),
    "Q2_K": (10, "int8"),
    "Q3_K": (11, "int8"),
    "Q4_K": (12, "int4"),
    "Q5_K": (13, "int8"),
    "Q6_K": (14, "int8"),
    "IQ4_NL": (20, "int8"),
    "IQ4_XS": (23, "int8"),
    "MXFP4": (39, "int8"),
}
PLAIN = {"F32": 0, "F16": 1, "BF16": 30}  # which can be read as blocks, too


def number_of(kind: str) -> int:
    """Ggml's number of a type."""
    return PLAIN[kind] if kind in PLAIN else KINDS[kind][0]


@dataclass(frozen=True)
class Blocks:
    """A matrix (out, in) of quantised weights, in memory that somebody else owns.

    ``memory``: bytes (out * bytes of a row). ``kind``: ggml's name of the type. ``order`` (out):
    the row of the memory that each row of the matrix is; None: its own.
    """

    memory: Tensor
    kind: str
    shape: tuple[int, int]
    order: Tensor | None = None

    def __len__(self) -> int:
        """The rows."""
        return self.shape[0]

    @property
    def number(self) -> int:
        """The number of the type."""
        return number_of(self.kind)

    @property
    def width(self) -> str:
        """The kind of PackedWeight that keeps most of it."""
        return KINDS[self.kind][1]

    @property
    def is_centred(self) -> bool:
        """True for four bits around zero: a minimum says nothing that the scale does not."""
        return self.kind == "Q4_0"

    def rows(self, library: Library, first: int, count: int) -> Tensor:
        """The rows from ``first`` on, as (count, in) float32."""
        return self.gather(library, torch.arange(first, first + count))

    def gather(self, library: Library, indices: Tensor) -> Tensor:
        """The rows ``indices`` (…), as (…, in) float32."""
        out = torch.empty((*indices.shape, self.shape[1]))
        self.read(library, indices, out)
        return out

    def read(self, library: Library, indices: Tensor, out: Tensor) -> None:
        """Write the rows ``indices`` (…) into ``out`` (…, in), which is float32."""
        rows = indices if self.order is None else self.order[indices]
        rows = rows.contiguous()
        library.without_gil.unpack_blocks(
            self.memory.data_ptr(),
            self.number,
            self.shape[1],
            rows.data_ptr(),
            rows.numel(),
            out.data_ptr(),
        )

    def multiply(self, library: Library, x: Tensor) -> Tensor:
        """The product of ``x`` (…, in) with all rows, in float32: (…, out), as ``x`` is."""
        self.check(library)
        inputs = x.reshape(-1, self.shape[1]).float().contiguous()
        order = None if self.order is None else self.order.contiguous()
        out = torch.empty((len(inputs), self.shape[0]))
        library.without_gil.multiply_blocks(
            *(self.memory.data_ptr(), self.number, self.shape[1]),
            None if order is None else order.data_ptr(),
            *(self.shape[0], inputs.data_ptr(), len(inputs), out.data_ptr()),
        )
        return out.view(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def check(self, library: Library) -> None:
        """Raise ValueError where the memory is of another size."""
        row = library.with_gil.block_row_bytes(self.number, self.shape[1])
        if not row or row * self.shape[0] != self.memory.numel():
            raise ValueError(
                f"{math.prod(self.memory.shape)} bytes are no {self.kind} {self.shape}"
            )


@dataclass(frozen=True)
class Pieces:
    """A matrix (out, in) that is made some rows at a time, and never as a whole in memory.

    ``make(first, count)``: these rows, as numbers (count, in) or as blocks. ``whole``: all of them,
    where they lie in a file.
    """

    shape: tuple[int, int]
    make: Callable[[int, int], Tensor | Blocks]
    whole: Tensor | None = None

    def __len__(self) -> int:
        """The rows."""
        return self.shape[0]


Matrix = Tensor | Blocks | Pieces
