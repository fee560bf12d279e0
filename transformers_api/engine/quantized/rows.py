"""A quantised matrix of a checkpoint, read some rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from transformers_api.checkpoints.headers.quantized_parts import QuantizedTensor
from transformers_api.engine.file_tensor import FileTensor

GROUP = 32  # weights of a block
AT_ONCE = 1 << 19  # weights whose numbers on the way stay in a core's cache
Parts = Mapping[str, FileTensor]


class QuantizedRows(ABC):
    """Meets StoredRows."""

    dtype = torch.float32

    def __init__(self, spec: QuantizedTensor, parts: Parts, index: int | None = None) -> None:
        self.spec = spec
        self.parts = parts
        self.index = index  # of a matrix in a stack of them

    @property
    def shape(self) -> tuple[int, int]:
        """See StoredRows."""
        out, width = self.spec.shape[-2:]
        return out, width

    @property
    def kind(self) -> str | None:
        """See StoredRows."""
        return None

    @property
    def width(self) -> str | None:
        """See StoredRows."""
        return "int8"

    @abstractmethod
    def few_rows(self, first: int, count: int) -> Tensor:
        """See ``rows``. For a few at a time."""

    def few_blocks(self, first: int, count: int) -> Tensor:
        """See ``blocks``. For a few at a time."""
        raise NotImplementedError

    def rows(self, first: int, count: int) -> Tensor:
        """See StoredRows."""
        made = torch.empty(count, self.shape[1])
        for start, some in self._parts_of(first, count):
            made[start - first : start - first + some] = self.few_rows(start, some)
        return made

    def blocks(self, first: int, count: int) -> Tensor:
        """See StoredRows."""
        return torch.cat([self.few_blocks(*part) for part in self._parts_of(first, count)])

    def _parts_of(self, first: int, count: int) -> list[tuple[int, int]]:
        few = max(AT_ONCE // self.shape[1] // 8, 1) * 8  # outputs of a word, in some layouts
        return [(i, min(few, first + count - i)) for i in range(first, first + count, few)]

    def gather(self, indices: Tensor) -> Tensor:
        """See StoredRows."""
        flat = indices.reshape(-1).tolist()
        rows = {index: self.few_rows(index, 1) for index in set(flat)}
        return torch.cat([rows[index] for index in flat]).view(*indices.shape, self.shape[1])

    def lying(self) -> tuple[Tensor, str] | None:
        """See StoredRows."""
        return None

    def release(self) -> None:
        """See StoredRows."""
        for part in self.parts.values():
            part.release()

    def _view(self, name: str) -> Tensor:
        tensor = self.parts[name].view()
        return tensor if self.index is None else tensor[self.index]
