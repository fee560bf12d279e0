"""Models with recurrent layers in a batch: prompts one at a time and whole, then steps together."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.model_runner import ModelRunner
from transformers_api.engine.state_cache import StateCache


class StateRunner(ModelRunner):
    """A ModelRunner over a StateCache."""

    cache: StateCache

    def __init__(self, model: Any, cache: StateCache, vocab_size: int) -> None:
        super().__init__(model, cache, vocab_size)
        names = inspect.signature(model.forward).parameters
        if "past_key_values" not in names:
            self.cache_name = "cache_params"  # Mamba's name for it
        self.takes_positions = "position_ids" in names

    def bind(self, batch: Batch, positions: Tensor, context: int) -> None:
        """See ModelRunner."""
        super().bind(batch, positions, context)
        self.cache.aim_states(is_fresh=not batch.sequences[0].num_cached)
