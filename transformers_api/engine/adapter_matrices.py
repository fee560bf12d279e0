"""The matrices of an adapter's file, as a model's layers take them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from transformers_api.checkpoints.headers.gguf_adapter import (
    ggml_names,
    read_gguf_adapter,
    read_numbers,
    row_heads,
)
from transformers_api.engine.adapter_source import AdapterLayer, AdapterSource
from transformers_api.engine.gguf_weights import row_order


class PeftMatrices:
    """Those of a folder's safetensors."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "pt")

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def placed(self, layer: AdapterLayer) -> AdapterLayer:
        """The layer under its path in the model."""
        return layer

    def numbers(self, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        """Down (rank, in) and up (out, rank), float32."""
        down, up = (self._file.get_tensor(name).float() for name in (layer.down, layer.up))
        return down, up

    def vector(self, name: str) -> Tensor:
        """Numbers (out), float32."""
        vector: Tensor = self._file.get_tensor(name).float().reshape(-1)
        return vector


class GgufMatrices:
    """Those of a GGUF file. Raises ValueError for a layer that ``model`` has not."""

    def __init__(self, source: AdapterSource, model: Any) -> None:
        assert source.architecture is not None
        self._path = source.weights
        self._config = model.config.get_text_config(decoder=True)
        self._adapter = read_gguf_adapter(source.weights)
        linear = (p for p, m in model.named_modules() if hasattr(m, "in_features"))
        names = ggml_names(source.architecture, (f"{path}.weight" for path in linear))
        self._paths = {layer: name.removesuffix(".weight") for layer, name in names.items()}
        self._layers = {b.name: layer for layer, (_, b) in self._adapter.layers.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing is open."""

    def placed(self, layer: AdapterLayer) -> AdapterLayer:
        """See PeftMatrices."""
        if layer.path not in self._paths:
            raise ValueError(f"the base has no layer {layer.path}")
        return replace(layer, path=self._paths[layer.path])

    def numbers(self, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        """See PeftMatrices."""
        name = self._layers[layer.up]
        down, up = (
            torch.from_numpy(read_numbers(self._path, part)) for part in self._adapter.layers[name]
        )
        heads = row_heads(self._adapter.architecture, name, self._config)
        if heads is None:
            return down, up
        if heads < 1 or len(up) % (2 * heads):
            raise ValueError(f"{layer.up} has {len(up)} rows, which are not pairs of {heads} heads")
        order = row_order({"op": "heads", "heads": heads}, len(up))
        assert order is not None
        return down, up[order]

    def vector(self, name: str) -> Tensor:
        """See PeftMatrices: such a file has none."""
        raise KeyError(name)
