"""Figures of how sure a model is of a token, from logits; on the engine thread."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from transformers_api.engine.sampling.fast_sampler import largest
from transformers_api.inspection.base import LensReading
from transformers_api.inspection.uncertainty import Uncertainty, settled_layer


def divergence(logits: Tensor, last: int, middle: int) -> float:
    """KL(last || middle) in nats, of rows of ``logits`` (N, V)."""
    own, other = logits[last].log_softmax(-1), logits[middle].log_softmax(-1)
    shares = torch.where(own.isfinite(), own.exp() * (own - other), 0.0)
    return max(float(shares.sum()), 0.0)


def uncertainty_of(
    logits: Tensor, entropy: float, lens: SequenceOf[LensReading], lens_kl: float | None
) -> Uncertainty:
    """Of ``logits`` (V,), and the lens' readings."""
    logprobs = logits.float().log_softmax(-1)
    probs = logprobs.exp()
    spread = torch.where(probs > 0, probs * (logprobs + entropy).square(), 0.0)
    values, _ = largest(probs, min(2, len(probs)))
    choices = [(reading.layer, reading.top.token_ids[0]) for reading in lens]
    return Uncertainty(
        entropy=entropy,
        varentropy=float(spread.sum()),
        margin=float(values[0] - values[-1]) if len(values) > 1 else 1.0,
        settled_layer=settled_layer(choices),
        lens_kl=lens_kl,
    )
