"""The weights of a GGUF file where they lie: mapped, never copied as a whole.

``weights.json`` of a folder in the store, which ``checkpoints`` writes, says for each parameter of
the model which parts of which files it is made of, and how.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_api.checkpoints.headers.weight_table import TABLE as TABLE
from transformers_api.checkpoints.headers.weight_table import read_table
from transformers_api.engine.mapped_file import MappedFile
from transformers_api.engine.stored_weights import StoredWeights
from transformers_api.errors import ModelLoadFailed

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Dequantize = Callable[[Tensor, str, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (out, in) in a file. ``kind``: ggml's name of its type.

    ``order`` (out): the row of the memory that each row of the matrix is; None: its own.
    """

    part: StoredPart
    shape: tuple[int, int]
    order: Tensor | None

    @property
    def memory(self) -> Tensor:
        """Its bytes."""
        return self.part.memory

    @property
    def kind(self) -> str:
        """See above."""
        return self.part.kind

    def release(self) -> None:
        """See MappedFile."""
        self.part.release()

    def dense(self, dequantize: Dequantize, first: int, count: int) -> Tensor:
        """Some rows of the memory, in its own order, as float32 (count, in)."""
        row = self.part.bytes // self.shape[0]
        memory = self.memory[first * row : (first + count) * row]
        if self.kind in FLOATS:
            return memory.view(FLOATS[self.kind]).view(count, -1).float()
        return dequantize(memory, self.kind, (count, self.shape[1]))

    def floats(self) -> Tensor | None:
        """The numbers themselves, where they are not quantised."""
        if self.kind not in FLOATS:
            return None
        rows = self.memory.view(FLOATS[self.kind]).view(self.shape)
        return rows if self.order is None else rows[self.order]


@dataclass(frozen=True)
class StoredPart:
    """A tensor of a file, and what has to be done to it."""

    file: MappedFile
    offset: int
    bytes: int
    kind: str
    shape: tuple[int, ...]
    ops: tuple[Mapping[str, Any], ...]

    @property
    def memory(self) -> Tensor:
        """Its bytes."""
        return self.file.bytes[self.offset : self.offset + self.bytes]

    def release(self) -> None:
        """See MappedFile."""
        self.file.release(self.offset, self.bytes)

    def dense(self, dequantize: Dequantize) -> Tensor:
        """The parameter, or its part, in float32 or in the file's own format."""
        if self.kind in FLOATS:
            tensor = self.memory.view(FLOATS[self.kind]).view(self.shape)
        else:
            rows = self.shape[:-1]
            flat = functools.reduce(int.__mul__, rows, 1), self.shape[-1]
            tensor = dequantize(self.memory, self.kind, flat).view(self.shape)
        for op in self.ops:
            tensor = _applied(op, tensor)
        return tensor

    def matrix(self) -> StoredMatrix | None:
        """The matrix (out, in) that a linear layer multiplies with, where the rows lie whole."""
        if len(self.shape) != 2:
            return None
        order: Tensor | None = None
        for op in self.ops:
            if op["op"] == "transpose":  # the parameter is (in, out)
                continue
            own = row_order(op, self.shape[0])
            if own is None:
                return None
            order = own if order is None else order[own]
        return StoredMatrix(self, self.shape, order)

    def experts(self) -> list[StoredMatrix]:
        """The matrices (out, in) of a stack of them, each where it lies."""
        count, out, width = self.shape
        size = self.bytes // count
        return [
            StoredMatrix(
                replace(
                    self, offset=self.offset + i * size, bytes=size, shape=(out, width), ops=()
                ),
                (out, width),
                None,
            )
            for i in range(count)
        ]


@dataclass(frozen=True)
class InterleavedRows:
    """Meets StoredRows: a matrix whose rows are those of two of a file by turns."""

    parts: tuple[StoredMatrix, StoredMatrix]
    weights: GgufWeights
    kind: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """See StoredRows."""
        out, width = self.parts[0].shape
        return 2 * out, width

    @property
    def width(self) -> str | None:
        """See StoredRows."""
        return None if self.parts[0].kind in FLOATS else "int8"

    def rows(self, first: int, count: int) -> Tensor:
        """See StoredRows."""
        begin, end = first // 2, -(-(first + count) // 2)
        both = [part.dense(self.weights.dequantize, begin, end - begin) for part in self.parts]
        return torch.stack(both, dim=1).flatten(0, 1)[first - 2 * begin :][:count]

    def gather(self, indices: Tensor) -> Tensor:
        """See StoredRows."""
        rows = [self.rows(index, 1) for index in indices.reshape(-1).tolist()]
        return torch.cat(rows).view(*indices.shape, -1)

    def blocks(self, first: int, count: int) -> Tensor:
        """See StoredRows."""
        raise NotImplementedError

    def lying(self) -> tuple[Tensor, str] | None:
        """See StoredRows."""
        return None

    def release(self) -> None:
        """See StoredRows."""
        for part in self.parts:
            part.release()


class GgufWeights(StoredWeights):
    """The parameters of a model by their names. Raises ModelLoadFailed for a table it cannot read.

    ``dequantize(bytes, type, (out, in))`` makes float32 of blocks.
    """

    def __init__(self, folder: Path) -> None:
        table = read_table(folder)
        self._files = files = [MappedFile(Path(file["path"])) for file in table["files"]]
        self._tensors: dict[str, Any] = table["tensors"]
        self._parts = {
            name: [_part(files, part) for part in tensor["parts"]]
            for name, tensor in self._tensors.items()
        }
        self.dequantize: Dequantize = by_gguf

    @property
    def method(self) -> str:
        """See StoredWeights."""
        return "gguf"

    def bind(self, model: Any) -> None:
        """See StoredWeights. The table was made for this model."""

    def __contains__(self, name: object) -> bool:
        """See StoredWeights."""
        return name in self._parts

    @property
    def names(self) -> Sequence[str]:
        """The parameters."""
        return list(self._parts)

    @functools.cached_property
    def types(self) -> Counter[str]:
        """See StoredWeights."""
        types: Counter[str] = Counter()
        for parts in self._parts.values():
            for part in parts:
                types[part.kind] += functools.reduce(int.__mul__, part.shape, 1)
        return types

    @property
    def is_quantized(self) -> bool:
        """See StoredWeights."""
        return any(kind not in FLOATS for kind in self.types)

    @property
    def dtype(self) -> torch.dtype:
        """The format of the numbers: a half one where all of some size have it, else float32."""
        halves = self.types.keys() - {"F32"}
        return (
            FLOATS[halves.pop()] if len(halves) == 1 and halves <= FLOATS.keys() else FLOATS["F32"]
        )

    def serving_dtype(self, dtype: str, device: str) -> torch.dtype:
        """See StoredWeights. "auto": float32 on a CPU, else 16 bits."""
        if dtype == "stored" or (dtype == "auto" and device != "cpu"):
            halves = torch.float32 if device == "cpu" else torch.bfloat16
            return halves if self.dtype == torch.float32 else self.dtype
        return torch.float32 if dtype == "auto" else getattr(torch, dtype)

    @property
    def bytes(self) -> int:
        """See StoredWeights."""
        return sum(part.bytes for parts in self._parts.values() for part in parts)

    def matrix(self, name: str, *, is_transposed: bool = False) -> StoredMatrix | None:
        """See StoredWeights. The table says whether rows are (in) or (out)."""
        parts = self._parts[name]
        matrix = parts[0].matrix() if len(parts) == 1 else None
        if matrix is not None and sorted(matrix.shape) != sorted(self._tensors[name]["shape"]):
            raise ModelLoadFailed(f"{name} is {matrix.shape} in the file, not {self._shape(name)}")
        return matrix

    def experts(self, name: str, *, is_transposed: bool) -> list[list[Any]] | None:
        """See StoredWeights. What the table does besides turning them is no matter of matrices."""
        parts, join = self._parts[name], self._tensors[name]["join"]
        turned = ["transpose"] if is_transposed else []
        if any(len(p.shape) != 3 or [op["op"] for op in p.ops] != turned for p in parts):
            return None
        stacks = [part.experts() for part in parts]
        if join is None or (join["dim"] == 1 and not is_transposed):
            return [list(own) for own in zip(*stacks, strict=True)]
        if not (join.get("interleave") and is_transposed and len(parts) == 2 == join["dim"]):
            return None
        return [[InterleavedRows((a, b), self)] for a, b in zip(*stacks, strict=True)]

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """See StoredWeights."""
        parts, join = self._parts[name], self._tensors[name]["join"]
        tensors = [part.dense(self.dequantize).to(dtype) for part in parts]
        made = tensors[0].clone() if join is None else _joined(join, tensors)
        for part in parts:
            part.release()
        if made.shape != self._shape(name):
            raise ModelLoadFailed(
                f"{name} is {tuple(made.shape)} in the file, not {self._shape(name)}"
            )
        return made.contiguous()

    def close(self) -> None:
        """See StoredWeights."""
        for file in self._files:
            file.close()

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])


def by_gguf(memory: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
    """Float32 of blocks by the ``gguf`` package, which knows every type."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    values = gguf.dequantize(memory.numpy().reshape(shape[0], -1), number)
    return torch.from_numpy(values.reshape(shape))


def _part(files: Sequence[MappedFile], part: Mapping[str, Any]) -> StoredPart:
    return StoredPart(
        files[part["file"]],
        part["offset"],
        part["bytes"],
        part["type"],
        tuple(part["shape"]),
        tuple(part["ops"]),
    )


def row_order(op: Mapping[str, Any], rows: int) -> Tensor | None:
    """The rows' new order, for operations that do nothing else."""
    indices = torch.arange(rows)
    match op["op"]:
        case "heads":  # pairs that are rotated: beside each other there, half a head apart here
            return indices.view(op["heads"], -1, 2).transpose(1, 2).reshape(-1)
        case "bloom_qkv":  # q, k and v of all heads there, of each head here
            return indices.view(3, op["heads"], -1).transpose(0, 1).reshape(-1)
    return None


def _joined(join: Mapping[str, Any], tensors: Sequence[Tensor]) -> Tensor:
    if join.get("interleave"):  # the first of each, the second of each
        return torch.stack(list(tensors), dim=join["dim"] + 1).flatten(join["dim"])
    return torch.cat(list(tensors), dim=join["dim"])


def _applied(op: Mapping[str, Any], tensor: Tensor) -> Tensor:
    if (order := row_order(op, tensor.shape[0])) is not None:
        return tensor[order]
    match op["op"]:
        case "transpose":
            return tensor.transpose(-2, -1)
        case "add":
            return tensor + float(op["value"])
        case "unsqueeze":
            return tensor.unsqueeze(int(op["dim"]))
        case "log_neg":
            return torch.log(-tensor)
    raise ModelLoadFailed(f"weights.json has an unknown operation: {op['op']!r}")
