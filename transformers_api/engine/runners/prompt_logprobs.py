"""Log probabilities of a prompt's own tokens: ``echo`` with ``logprobs``, as evaluations ask."""

from __future__ import annotations

import math

from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.engine.not_finite import not_finite
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.engine.sampling.sampler import token_scores
from transformers_api.engine.scheduler import SlotStore
from transformers_api.engine.sequence import Sequence


class PromptScoringRunner:
    """Wraps a runner: scores the prompts of sequences that asked, chunk by chunk."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner

    @property
    def cache(self) -> SlotStore:
        """The inner runner's."""
        return self.inner.cache

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        seq = batch.sequences[0]
        if not seq.is_scoring:  # one that is has its passes to itself
            return self.inner.forward(batch, keep)
        logits = self.inner.forward(batch, max(keep, batch.width))  # (1, T, V)
        self._score(seq, logits[0, -batch.width :])
        return logits[:, -keep:]

    def clear(self) -> None:
        """See Runner."""
        self.inner.clear()

    def _score(self, seq: Sequence, logits: Tensor) -> None:
        """Row i of ``logits`` (T, V) predicts the prompt's token after the chunk's i-th."""
        if seq.prompt_scores is None:
            seq.prompt_scores = [None]
        first = seq.num_cached + 1
        targets = seq.tokens[first : min(first + len(logits), seq.prompt_len)]
        counts = [seq.params.prompt_logprobs] * len(targets)
        scores = token_scores(logits[: len(targets)], targets, counts, ranked=True)
        if any(score and math.isnan(score.logprob) for score in scores):
            raise not_finite()
        seq.prompt_scores += scores
