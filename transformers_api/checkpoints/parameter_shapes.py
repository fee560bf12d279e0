"""The shapes of a model's parameters, from its configuration alone: nothing is reserved."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.errors import ModelLoadFailed


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Parameters and stored buffers by their names, tied ones once, under the embedding's name.

    Of an encoder without what pools a sentence for classification. Raises ModelLoadFailed.
    """
    is_encoder = config.architectures == [MODEL_MAPPING_NAMES.get(config.model_type)]
    make: Any = AutoModel if is_encoder else AutoModelForCausalLM
    try:
        model = _empty(make, config)
    except Exception as error:  # the configuration is a stranger's
        raise ModelLoadFailed(f"its metadata makes no model: {error}") from error
    stored = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: tuple(tensor.shape)
        for name, tensor in named
        if name in stored and not (is_encoder and name.startswith("pooler."))
    }


def _empty(make: Any, config: Any) -> Any:
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        ShapesOnly(),
        torch.device("meta"),
        no_init_weights(),
    ):
        model = make.from_config(config)
    model.tie_weights()
    return model
