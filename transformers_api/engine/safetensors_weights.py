"""The weights of a folder of safetensors where they lie: one file, or many shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import get_state_dict_dtype
from transformers.pytorch_utils import Conv1D

from transformers_api.checkpoints.headers.quantized import left_out, quantization_of, read_quantized
from transformers_api.checkpoints.headers.quantized_parts import Files
from transformers_api.checkpoints.headers.safetensors_file import read_header
from transformers_api.checkpoints.headers.text_names import has_towers, renamed, text_weights
from transformers_api.engine.file_tensor import FileTensor
from transformers_api.engine.mapped_file import MappedFile
from transformers_api.engine.pretrained import dtype_of, read_config
from transformers_api.engine.quantized.tensor import QuantizedFileTensor
from transformers_api.engine.stored_weights import StoredRows, StoredWeights, elements
from transformers_api.engine.text_part import causal_model
from transformers_api.engine.weight_names import Group, WeightNames, map_names
from transformers_api.errors import ModelLoadFailed

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWeights(StoredWeights):
    """Those of a folder in the transformers format."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = [MappedFile(path) for path in weight_files(folder)]
        tensors = {
            entry.name: FileTensor(file, entry)
            for file in self._files
            for entry in read_header(file.path)
        }
        config = json.loads((folder / "config.json").read_bytes())
        self._is_part = has_towers(config)  # the model is the language part of the files
        if self._is_part:
            own = text_weights(tensors)
            tensors = {name: tensor for name, tensor in tensors.items() if name in own}
        self._plain = tensors
        self._quantized = _quantized(folder, tensors)
        self._tensors: dict[str, FileTensor | QuantizedFileTensor] = {**tensors, **self._quantized}
        if self._quantized:
            parts = {part for each in self._quantized.values() for part in each.spec.parts.values()}
            for name in [*parts, *filter(left_out, tensors)]:
                if name not in self._quantized:
                    self._tensors.pop(name, None)
        self._names: WeightNames | None = None
        self._made: tuple[Group, dict[str, Tensor]] | None = None  # by a conversion, to be taken

    @cached_property
    def types(self) -> Counter[str]:
        """See StoredWeights."""
        types: Counter[str] = Counter()
        for tensor in self._tensors.values():
            types[tensor.type] += elements(tensor.shape)
        return types

    @property
    def is_quantized(self) -> bool:
        """See StoredWeights."""
        return bool(self._quantized)

    @property
    def method(self) -> str:
        """See StoredWeights."""
        return _method(self._folder) if self._quantized else "none"

    @property
    def bytes(self) -> int:
        """See StoredWeights."""
        return sum(tensor.bytes for tensor in self._tensors.values())

    def serving_dtype(self, dtype: str, device: str) -> torch.dtype:
        """See StoredWeights. As transformers has it: the configuration's, else the first one's."""
        _, config = causal_model(read_config(self._folder, trust_remote_code=False))
        made: Any = dtype_of(dtype, device, config, self._folder)
        if made == "auto":
            made = config.dtype
        if made is None:
            first = [t for t in self._plain.values() if t.file is self._files[0]]
            empty = {t.entry.name: torch.empty(0, dtype=t.dtype, device="meta") for t in first}
            made = get_state_dict_dtype(empty)  # type: ignore[no-untyped-call]
        return made if isinstance(made, torch.dtype) else getattr(torch, made)

    def bind(self, model: Any) -> None:
        """See StoredWeights."""
        if self._quantized and any(type(module) is Conv1D for module in model.modules()):
            raise ModelLoadFailed(
                f"{self.method} weights of {type(model).__name__} cannot be read: its layers have "
                "them the other way round"
            )
        shapes = {name: torch.Size(tensor.shape) for name, tensor in self._tensors.items()}
        renamings = renamed(shapes, model.state_dict()) if self._is_part else None
        self._names = map_names(
            *(model, shapes, model.config.dtype, self._folder, self._are_equal), renamings
        )

    def _are_equal(self, one: Group, other: Group) -> bool:
        """True where two parameters that are tied in the model are the same in the files."""
        if one.converter is not None or other.converter is not None:
            return False
        a, b = (self._tensors[group.sources[0][1]] for group in (one, other))
        if not isinstance(a, FileTensor) or not isinstance(b, FileTensor):
            return False
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
        return tensor.matrix(None, dtype=self.names.dtypes[name], is_transposed=is_transposed)

    def experts(self, name: str, *, is_transposed: bool) -> list[list[StoredRows]] | None:
        """See StoredWeights."""
        group, name = self.names.groups[name]
        dtype = self.names.dtypes[name]
        if group.converter is None:
            tensor = self._tensors[group.sources[0][1]]
            if len(tensor.shape) != 3:
                return None
            return [
                [tensor.matrix(index, dtype=dtype, is_transposed=is_transposed)]
                for index in range(tensor.shape[0])
            ]
        stacked = None if is_transposed else group.stacked()
        if stacked is None:
            return None
        return [
            [self._tensors[each].matrix(None, dtype=dtype) for each in parts] for parts in stacked
        ]

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


def _method(folder: Path) -> str:
    quantization = quantization_of(json.loads((folder / "config.json").read_bytes()))
    return "none" if quantization is None else str(quantization["quant_method"])


def _quantized(folder: Path, tensors: Mapping[str, FileTensor]) -> dict[str, QuantizedFileTensor]:
    """The quantised parameters of a folder by their names. Raises ModelLoadFailed."""
    quantization = quantization_of(json.loads((folder / "config.json").read_bytes()))
    if quantization is None:
        return {}
    entries = {name: tensor.entry for name, tensor in tensors.items()}
    files = Files(entries, lambda name: tensors[name].view().numpy().tobytes())
    return {
        name: QuantizedFileTensor(spec, {role: tensors[part] for role, part in spec.parts.items()})
        for name, spec in read_quantized(quantization, files).items()
    }
