"""The weights of a model where they lie: mapped, never copied as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class StoredRows(Protocol):
    """A matrix (out, in) of files, read some rows at a time.

    ``kind``: ggml's name of the blocks that its numbers can be said in, or None. ``width``: that of
    packed weights which loses least of them; None: the numbers are no quantised ones.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def kind(self) -> str | None:
        """See above."""
        ...

    @property
    def width(self) -> str | None:
        """See above."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The format of the numbers."""
        ...

    def rows(self, first: int, count: int) -> Tensor:
        """The rows from ``first`` on, (count, in), as numbers."""
        ...

    def gather(self, indices: Tensor) -> Tensor:
        """The rows ``indices`` (…) as (…, in)."""
        ...

    def blocks(self, first: int, count: int) -> Tensor:
        """The bytes of these rows in blocks of ``kind``."""
        ...

    def lying(self) -> tuple[Tensor, str] | None:
        """All of its bytes and ggml's name of their type, where that says the very numbers.

        None where rows have to be made.
        """
        ...

    def release(self) -> None:
        """Give back the memory of what was read."""
        ...


class StoredWeights(ABC):
    """The parameters of a model by their names.

    ``method``: the format of those that are quantised, as ``/status`` tells it.
    """

    @property
    @abstractmethod
    def method(self) -> str:
        """See above."""

    @property
    @abstractmethod
    def types(self) -> Counter[str]:
        """Weights by the type that they are stored in."""

    @property
    @abstractmethod
    def is_quantized(self) -> bool:
        """True where some weights are no plain numbers."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of all parameters in the files."""

    @abstractmethod
    def serving_dtype(self, dtype: str, device: str) -> torch.dtype:
        """The format of a model that is loaded with ``dtype``; "stored": the file's own."""

    @abstractmethod
    def bind(self, model: Any) -> None:
        """Find the parameters of ``model``, which are all empty, in the files.

        Raises ModelLoadFailed for those that are missing, left over, or of another shape.
        """

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """True for the name of a parameter."""

    @abstractmethod
    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter in memory of its own, as the model has it.

        ``dtype``: of a model's numbers, where the parameter has no other one.
        """

    @abstractmethod
    def matrix(self, name: str, *, is_transposed: bool = False) -> Any | None:
        """The matrix (out, in) of a linear layer or an embedding, to be read where it lies.

        ``is_transposed``: the parameter is (in, out). None where it has to be made first.
        """

    def experts(self, name: str, *, is_transposed: bool) -> list[list[StoredRows]] | None:
        """The matrices of each expert, one below the other; None where they have to be made first.

        ``is_transposed``: those of the parameter are (in, out).
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of the files until they are read again."""

    def fill(self, model: Any, dtype: torch.dtype) -> None:
        """Give ``model`` the buffers of the files, and the parameters that are on ``meta`` yet.

        Those that are one parameter of several modules stay one.
        """
        made: dict[int, nn.Parameter] = {}
        for path, module in model.named_modules():
            for leaf, tensor in list(module._parameters.items()):
                name = f"{path}.{leaf}" if path else leaf
                is_empty = tensor is not None and tensor.is_meta and id(tensor) not in made
                if is_empty and name in self:
                    numbers = self.dense(name, dtype)
                    made[id(tensor)] = nn.Parameter(numbers, numbers.is_floating_point())
        for path, module in model.named_modules():
            for leaf, tensor in list(module._parameters.items()):
                if id(tensor) in made:
                    setattr(module, leaf, made[id(tensor)])
            for leaf in module._buffers:
                name = f"{path}.{leaf}" if path else leaf
                if name in self:
                    setattr(module, leaf, self.dense(name, dtype))


def elements(shape: Sequence[int]) -> int:
    """The numbers in a tensor of this shape."""
    return torch.Size(shape).numel()
