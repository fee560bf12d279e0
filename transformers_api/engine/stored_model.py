"""A model from weights where they lie in their files: built empty, then filled by who runs it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_api.checkpoints.headers.quantized import (
    BY_TRANSFORMERS,
    check_method,
    quantization_of,
)
from transformers_api.engine.gguf_weights import TABLE, GgufWeights
from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.engine.pretrained import differentiable, empty_model
from transformers_api.engine.safetensors_weights import SafetensorsWeights
from transformers_api.engine.stored_weights import StoredWeights
from transformers_api.engine.weight_names import NotStreamed
from transformers_api.errors import ModelLoadFailed

log = logging.getLogger(__name__)
Fill = Callable[[Any, StoredWeights, torch.dtype], None]


def stored_weights(folder: Path, trust_remote_code: bool) -> StoredWeights | None:
    """Return the weights of a folder; None where code of the model's own has to read them."""
    if (folder / TABLE).is_file():
        return GgufWeights(folder)
    config = json.loads((folder / "config.json").read_bytes())
    if (quantization := quantization_of(config)) is not None:
        check_method(quantization, config.get("model_type"))
        if quantization["quant_method"] in BY_TRANSFORMERS:
            return None
    if trust_remote_code and "auto_map" in config:
        log.info("%s has code of its own, so it is loaded by transformers, whole", folder.name)
        return None
    return SafetensorsWeights(folder)


def load_stored(folder: Path, stored: StoredWeights, dtype: torch.dtype, fill: Fill) -> Any:
    """A causal language model in evaluation mode on the CPU, whose weights ``fill`` has put in.

    Its attribute ``stored_weights`` is ``stored``. Raises ModelLoadFailed, NotStreamed.
    """
    try:
        with differentiable(), ShapesOnly():
            model = empty_model(folder, dtype)
            stored.bind(model)
            fill(model, stored, dtype)
            if next(model.parameters(), None) is None:  # whose device is the model's
                model.register_parameter("device_of_model", nn.Parameter(torch.zeros(1)))
        if empty := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
            raise ModelLoadFailed(f"The file has no weights for {', '.join(empty[:3])}")
    except (ModelLoadFailed, NotStreamed):
        raise
    except Exception as error:
        log.exception("Loading %s failed", folder.name)
        raise ModelLoadFailed(f"The model cannot be loaded: {error}") from error
    model.stored_weights = stored
    with differentiable():
        return model.eval().requires_grad_(False)
