"""The weights of a folder of safetensors where they lie: one file, or many shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import get_state_dict_dtype

from transformers_api.checkpoints.headers.safetensors_file import DTYPES, read_header
from transformers_api.checkpoints.headers.safetensors_file import Tensor as Entry
from transformers_api.engine.mapped_file import MappedFile
from transformers_api.engine.pretrained import causal_config, dtype_of, read_config
from transformers_api.engine.stored_weights import StoredRows, StoredWeights
from transformers_api.engine.weight_names import Group, WeightNames, map_names

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
        """See StoredRows."""
        return self._matrix()[first : first + count].to(self.dtype)

    def gather(self, indices: Tensor) -> Tensor:
        """See StoredRows."""
        return self._matrix()[indices].to(self.dtype)

    def blocks(self, first: int, count: int) -> Tensor:
        """See StoredRows."""
        raise NotImplementedError

    def release(self) -> None:
        """See StoredRows."""
        entry = self.tensor.entry
        size = entry.bytes if self.index is None else entry.bytes // entry.shape[0]
        self.tensor.file.release(entry.offset + (self.index or 0) * size, size)


class SafetensorsWeights(StoredWeights):
    """Those of a folder in the transformers format."""

    method = "none"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = [MappedFile(path) for path in weight_files(folder)]
        self._tensors = {
            entry.name: FileTensor(file, entry)
            for file in self._files
            for entry in read_header(file.path)
        }
        self._names: WeightNames | None = None
        self._made: tuple[Group, dict[str, Tensor]] | None = None  # by a conversion, to be taken

    @cached_property
    def types(self) -> Counter[str]:
        """See StoredWeights."""
        types: Counter[str] = Counter()
        for tensor in self._tensors.values():
            types[tensor.entry.dtype] += tensor.entry.elements
        return types

    @property
    def is_quantized(self) -> bool:
        """See StoredWeights."""
        return False

    @property
    def bytes(self) -> int:
        """See StoredWeights."""
        return sum(tensor.entry.bytes for tensor in self._tensors.values())

    def serving_dtype(self, dtype: str, device: str) -> torch.dtype:
        """See StoredWeights. As transformers has it: the configuration's, else the first one's."""
        config = causal_config(read_config(self._folder, trust_remote_code=False))
        made: Any = dtype_of(dtype, device, config, self._folder)
        if made == "auto":
            made = config.dtype
        if made is None:
            first = [t for t in self._tensors.values() if t.file is self._files[0]]
            empty = {t.entry.name: torch.empty(0, dtype=t.dtype, device="meta") for t in first}
            made = get_state_dict_dtype(empty)  # type: ignore[no-untyped-call]
        return made if isinstance(made, torch.dtype) else getattr(torch, made)

    def bind(self, model: Any) -> None:
        """See StoredWeights."""
        shapes = {name: torch.Size(tensor.shape) for name, tensor in self._tensors.items()}
        self._names = map_names(model, shapes, model.config.dtype, self._folder, self._are_equal)

    def _are_equal(self, one: Group, other: Group) -> bool:
        """True where two parameters that are tied in the model are the same in the files."""
        if one.converter is not None or other.converter is not None:
            return False
        a, b = (self._tensors[group.sources[0][1]] for group in (one, other))
        is_same = a.entry.dtype == b.entry.dtype and torch.equal(a.view(), b.view())
        for tensor in (a, b):
            tensor.release()
        return is_same

    @property
    def names(self) -> WeightNames:
        """The parameters of the model that the weights are bound to."""
        assert self._names is not None
        return self._names

    def __contains__(self, name: object) -> bool:
        """True for the name of a parameter."""
        return name in self.names.groups

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """See StoredWeights."""
        group, name = self.names.groups[name]
        own = self.names.dtypes[name]
        if group.converter is None:
            return self._tensors[group.sources[0][1]].copied(own)
        if self._made is None or self._made[0] is not group:
            self._made = group, self._converted(group)
        made = self._made[1].pop(name)
        if not self._made[1]:
            self._made = None
        return made.contiguous()

    def _converted(self, group: Group) -> dict[str, Tensor]:
        dtype = self.names.dtypes[group.first]
        return group.convert(lambda name: self._tensors[name].copied(dtype), self.names.shapes)

    def matrix(self, name: str, *, is_transposed: bool = False) -> StoredRows | None:
        """See StoredWeights."""
        group, name = self.names.groups[name]
        shape = self.names.shapes[name]
        if group.converter is not None or len(shape) != 2:
            return None
        tensor = self._tensors[group.sources[0][1]]
        return PlainRows(tensor, self.names.dtypes[name], is_transposed)

    def experts(self, name: str, *, is_transposed: bool) -> list[list[StoredRows]] | None:
        """See StoredWeights."""
        group, name = self.names.groups[name]
        dtype = self.names.dtypes[name]
        if group.converter is None:
            tensor = self._tensors[group.sources[0][1]]
            if len(tensor.shape) != 3:
                return None
            return [[PlainRows(tensor, dtype, is_transposed, i)] for i in range(tensor.shape[0])]
        stacked = None if is_transposed else group.stacked()
        if stacked is None:
            return None
        return [[PlainRows(self._tensors[each], dtype) for each in parts] for parts in stacked]

    def close(self) -> None:
        """See StoredWeights."""
        for file in self._files:
            file.close()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; one wins over shards, as in transformers."""
    if (folder / ONE).is_file():
        return [folder / ONE]
    index: Mapping[str, Any] = json.loads((folder / INDEX).read_bytes())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]
