"""Figures of the distributions that a token was drawn from, by torch. Entropies are in nats."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from transformers_api.engine.backend import TokenStats
from transformers_api.engine.sampling.fast_sampler import largest
from transformers_api.engine.sampling.sampler import distribution
from transformers_api.engine.sequence import Sequence
from transformers_api.inspection.base import Likely

LOWEST = -1e4  # a logit; times a probability of 0 it is 0, which -inf is not


def token_stats(logits: Tensor, token: int, count: int) -> TokenStats:
    """Figures of ``logits`` (V,), with ``count`` of the likeliest tokens."""
    # Tensors of the size of the vocabulary cost more to allocate than to fill: one will do.
    probs = logits.softmax(-1)
    best, lowest = logits.max(), logits.min()
    total = best - probs.max().log()  # logsumexp
    finite = logits.clamp_min(LOWEST) if lowest < LOWEST else logits  # 0 * -inf is no number
    top = likely(probs, count)
    return TokenStats(
        logprob=float(logits[token] - total),
        entropy=max(float(total - probs @ finite), 0.0),
        rank=rank(logits, token),
        ids=top.token_ids,
        probs=top.probs,
    )


def drawn(logits: Tensor, seq: Sequence, token: int, count: int) -> tuple[float, float, Likely]:
    """The distribution ``token`` was drawn from: its probability, the entropy, the likeliest."""
    if seq.params.temperature == 0 and count <= 1:  # there was no other
        return 1.0, 0.0, Likely((token,), (1.0,)) if count else Likely()
    probs, ids = distribution(logits, seq, max(count, 1))
    return float(probs[ids == token].sum()), entropy(probs), likely(probs, count, ids)


def entropy(probs: Tensor) -> float:
    """The entropy of (V,), in nats."""
    return float(torch.special.entr(probs).sum())


def rank(scores: Tensor, token: int) -> int:
    """The number of tokens of (V,) that score higher."""
    numbers = scores.cpu().numpy()  # counts five times as fast as torch
    return int(numpy.count_nonzero(numbers > numbers[token]))


def likely(probs: Tensor, count: int, ids: Tensor | None = None) -> Likely:
    """The likeliest; ``ids``: of ``probs``, where they are not 0 to V - 1."""
    if not count:
        return Likely()
    values, places = largest(probs, min(count, len(probs)))
    tokens = places if ids is None else ids[places]
    return Likely(tuple(tokens.tolist()), tuple(values.tolist()))
