"""A model from weights that lie in a GGUF file: built empty, then filled by whoever runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.engine.pretrained import differentiable, empty_model
from transformers_api.engine.stored_weights import StoredWeights
from transformers_api.errors import ModelLoadFailed

log = logging.getLogger(__name__)
Fill = Callable[[Any, StoredWeights, torch.dtype], None]


def load_stored(folder: Path, stored: StoredWeights, dtype: torch.dtype, fill: Fill) -> Any:
    """A causal language model in evaluation mode on the CPU, whose weights ``fill`` has put in.

    Its attribute ``stored_weights`` is ``stored``. Raises ModelLoadFailed.
    """
    try:
        with differentiable(), ShapesOnly():
            model = empty_model(folder, dtype)
            fill(model, stored, dtype)
        if empty := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
            raise ModelLoadFailed(f"The file has no weights for {', '.join(empty[:3])}")
    except ModelLoadFailed:
        raise
    except Exception as error:
        log.exception("Loading %s failed", folder.name)
        raise ModelLoadFailed(f"The model cannot be loaded: {error}") from error
    model.stored_weights = stored
    with differentiable():
        return model.eval().requires_grad_(False)
