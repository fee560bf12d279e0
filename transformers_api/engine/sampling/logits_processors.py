"""Changes to one sequence's logits before the temperature. One class each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from transformers_api.engine.base import SamplingParams
from transformers_api.engine.sampling.dry import DryPenalty
from transformers_api.engine.sequence import LogitsProcessor, Sequence


class PastTokens:
    """The distinct ids of prompt and output, kept up as the sequence grows."""

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._read = 0

    def index(self, seq: Sequence, row: Tensor) -> Tensor:
        """Those that have a logit, sorted."""
        self._ids.update(token for token in seq.tokens[self._read :] if token < len(row))
        self._read = len(seq.tokens)
        return torch.tensor(sorted(self._ids), device=row.device)


class WordRepetitionPenalty:
    """Divide the logit of every token of prompt and output, whatever its sign.

    TinyGPT's own rule, to the letter: over tokens, not words, and a negative logit grows.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty
        self._past = PastTokens()

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See the class."""
        row[self._past.index(seq, row)] /= self.penalty


class RepetitionPenalty:
    """Divide positive and multiply negative logits of every token of prompt and output.

    ``last_n``: of the last so many only; -1: of all.
    Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """

    def __init__(self, penalty: float, last_n: int = -1) -> None:
        self.penalty = penalty
        self.last_n = last_n
        self._past = PastTokens()

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See the class."""
        ids = self._past.index(seq, row) if self.last_n < 0 else self._last(seq, row)
        logits = row[ids]
        row[ids] = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)

    def _last(self, seq: Sequence, row: Tensor) -> Tensor:
        tokens = {token for token in seq.tokens[-self.last_n :] if token < len(row)}
        return torch.tensor(sorted(tokens), dtype=torch.long, device=row.device)


class AdditivePenalties:
    """OpenAI's presence and frequency penalty, over the output only."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence = presence
        self.frequency = frequency
        self._counts: Counter[int] = Counter()
        self._read: int | None = None

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See the class."""
        self._counts.update(seq.tokens[self._read or seq.prompt_len :])
        self._read = len(seq.tokens)
        if self._counts:
            ids = torch.tensor(list(self._counts), device=row.device)
            counts = torch.tensor(list(self._counts.values()), device=row.device)
            row[ids] -= self.presence + self.frequency * counts


class LogitBias:
    """OpenAI's logit_bias: added to the logits of single tokens."""

    def __init__(self, bias: dict[int, float]) -> None:
        self._ids = torch.tensor(list(bias))
        self._values = torch.tensor(list(bias.values()))

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See the class."""
        row[self._ids.to(row.device)] += self._values.to(row.device)


class AllowedTokens:
    """No others can be sampled."""

    def __init__(self, ids: frozenset[int]) -> None:
        self._ids = torch.tensor(sorted(ids))

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See the class."""
        ids = self._ids.to(row.device)
        logits = row[ids]
        row.fill_(-torch.inf)
        row[ids] = logits


class MinTokens:
    """Stop tokens cannot be sampled before ``min_tokens``."""

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See the class."""
        if seq.masks_stops:
            ids = [token for token in seq.stop_ids if token < len(row)]
            row[torch.tensor(ids, dtype=torch.long, device=row.device)] = -torch.inf


class ForcedTokens:
    """Leave nothing but the token of this step, where it has one."""

    def __init__(self, tokens: Mapping[int, int]) -> None:
        self.tokens = tokens

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See the class."""
        if (token := self.tokens.get(seq.num_output)) is not None:
            row[:token], row[token + 1 :], row[token] = -torch.inf, -torch.inf, 0.0


def processors_for(params: SamplingParams) -> list[LogitsProcessor]:
    """The processors that a request needs, in the order in which they apply; mostly none."""
    processors: list[LogitsProcessor] = []
    if params.word_repetition_penalty != 1.0:
        processors.append(WordRepetitionPenalty(params.word_repetition_penalty))
    if params.repetition_penalty != 1.0 and params.repeat_last_n:
        processors.append(RepetitionPenalty(params.repetition_penalty, params.repeat_last_n))
    if params.presence_penalty or params.frequency_penalty:
        processors.append(AdditivePenalties(params.presence_penalty, params.frequency_penalty))
    if params.dry is not None:
        processors.append(DryPenalty(params.dry))
    if params.logit_bias:
        processors.append(LogitBias(dict(params.logit_bias)))
    if params.allowed_token_ids is not None:
        processors.append(AllowedTokens(params.allowed_token_ids))
    if params.min_tokens:
        processors.append(MinTokens())
    if params.forced:
        processors.append(ForcedTokens(params.forced))
    return processors
