"""Encoders whose linear layers are packed for the kernels; the rest of them stays torch's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from transformers_api.engine.backend import BackendRefused
from transformers_api.engine.base import EngineFacts
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.native.convert_model import CACHE_TYPES, packed_bytes
from transformers_api.engine.native.installation import provider
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.linear import NativeEmbedding, PackedWeight
from transformers_api.kernels.modules.replace import Widths, is_embedding, layer_groups, pack_model
from transformers_api.kernels.modules.weight_memory import WeightMemory

log = logging.getLogger(__name__)
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # of states, relative
LARGE_TABLE = 1 << 22  # numbers of an embedding from which it is packed, in bfloat16


def encoder_library(options: LoadOptions, device: str, threads: int | None) -> Library | None:
    """The kernels for an encoder; None where it has to do without."""
    if device != "cpu" or options.native is None:
        return None
    return provider(options.native, threads, options.native_isa).library()


def encoder_numbers(dtype: str, stored: str) -> str | None:
    """The format of packed weights for ``dtype`` and a file of ``stored``; None: there is none.

    "auto": the file's own numbers, all of them.
    """
    if dtype == "auto":
        return "bfloat16" if stored == "bfloat16" else "float32"
    return dtype if dtype in CACHE_TYPES else None


def pack_encoder(
    model: Any, library: Library, numbers: str, states: Callable[[Any], Tensor]
) -> None:
    """Pack the linear layers of ``model``. ``states(model)`` are those of a short text.

    Raises BackendRefused where they become others, and then the model is of no use.
    """
    try:
        expected: list[Tensor] = []
        groups = layer_groups(model, lambda: expected.append(states(model).float()))
        if numbers == "bfloat16":
            _pack_tables(model, library)
        pack_model(model, library, Widths(numbers), groups)
        change = (states(model).float() - expected[0]).norm() / expected[0].norm()
    except Exception as error:  # of the model's own code
        log.info("%s cannot be packed", type(model).__name__, exc_info=True)
        raise BackendRefused(f"packing failed: {error}") from error
    if not change <= TOLERANCE[numbers]:
        raise BackendRefused("it says something else with them")


def native_facts(model: Any, library: Library, numbers: str, facts: EngineFacts) -> EngineFacts:
    """``facts`` of an encoder, as it is packed."""
    size = facts.bytes + packed_bytes(model)
    return replace(facts, dtype=numbers, kernels="native", isa=library.isa, bytes=size)


def _pack_tables(model: Any, library: Library) -> None:
    """Keep large embeddings in their own format: the rest of a packed model is float32."""
    memory = WeightMemory()
    for module in list(model.modules()):
        for name, table in list(module.named_children()):
            if type(table) is not nn.Embedding or not is_embedding(table):
                continue
            if table.weight.numel() >= LARGE_TABLE and table.weight.dtype == torch.bfloat16:
                packed = PackedWeight(library, [table.weight], "bfloat16", memory)
                shape = torch.empty(table.weight.shape, dtype=torch.bfloat16, device="meta")
                setattr(module, name, NativeEmbedding(packed, shape))
