"""Tokens that a model's own generation config says are never generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.engine.scheduler import SlotStore


class SuppressingRunner:
    """Wraps a runner: ``suppress_tokens`` of the generation config have no probability."""

    def __init__(self, inner: Runner, token_ids: Sequence[int]) -> None:
        self.inner = inner
        self._ids = torch.tensor(sorted(token_ids))

    @property
    def cache(self) -> SlotStore:
        """The inner runner's."""
        return self.inner.cache

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        logits = self.inner.forward(batch, keep)
        return logits.index_fill(-1, self._ids.to(logits.device), -torch.inf)

    def clear(self) -> None:
        """See Runner."""
        self.inner.clear()
