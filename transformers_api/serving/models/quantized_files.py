"""The weights of a quantised checkpoint: how many, and how wide they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.quantized import (
    READERS,
    left_out,
    quantization_of,
    read_quantized,
)
from transformers_api.checkpoints.headers.quantized_parts import Files
from transformers_api.checkpoints.headers.safetensors_file import Tensor


def quantized_types(
    config: Mapping[str, Any], headers: Mapping[Path, Sequence[Tensor]]
) -> dict[str, int]:
    """Weights by the width that is near to them, or by their dtype; empty: none are quantised.

    ``headers``: of the files. Raises ModelLoadFailed for parts of a weight that do not fit.
    """
    quantization = quantization_of(config)
    if quantization is None or quantization["quant_method"] not in READERS:
        return {}
    tensors = {tensor.name: tensor for header in headers.values() for tensor in header}
    paths = {tensor.name: path for path, header in headers.items() for tensor in header}

    def read(name: str) -> bytes:
        with paths[name].open("rb") as file:
            file.seek(tensors[name].offset)
            return file.read(tensors[name].bytes)

    quantized = read_quantized(quantization, Files(tensors, read))
    types = Counter[str]()
    for each in quantized.values():
        types[each.width] += math.prod(each.shape)
    parts = {part for each in quantized.values() for part in each.parts.values()}
    for name in tensors.keys() - parts:
        if quantized and not left_out(name):
            types[tensors[name].dtype] += tensors[name].elements
    return dict(types)
