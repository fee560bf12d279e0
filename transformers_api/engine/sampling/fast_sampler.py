"""A fast sampler, for tokens that are beyond doubt.

``sampler.draw`` defines the token: of the tokens that the filters keep, the one whose
probability over its noise is largest. To work that out for a whole vocabulary costs more than a
forward pass of a small model, and most of it is wasted:

* 1 - u is at most -log(u), so a division shows which few tokens can win; only they need logarithms.
* The filters need to be asked about the winner only. It is kept if what comes before it leaves it
  a place; else it is out, with all that are less likely, and the rest race again.
* Probabilities may lack the factor that makes their sum 1.

The last bits come out differently that way. Where that could matter, and that is rare, the answer
is UNSURE, and the definition decides. The kernels do the same.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from transformers_api.engine.base import SamplingParams
from transformers_api.engine.sampling import rng
from transformers_api.engine.sampling.changed_rows import NO_CHANGES, ChangedRows
from transformers_api.engine.sequence import Sequence

UNSURE = -1
NEVER = 1e-20  # times the likeliest: the luckiest noise does not make up for it
EQUAL = 2e-6  # two that are nearer to each other may be in either order
CLOSE = 1e-5  # scores that are nearer are not told apart
SUM_ERROR = 1e-3  # more than a sum in float32 may be off
TINY = 1e-30  # a temperature that is smaller, or its inverse, may not be a normal float32
GROUP = 128  # tokens whose maximum is looked at first


class FastSampler(Protocol):
    """Draws the tokens that it is sure of."""

    applies_masks: bool  # False: those of ``changed`` have been applied

    def __call__(
        self, logits: Tensor, sequences: list[Sequence], changed: ChangedRows = NO_CHANGES
    ) -> list[int]:
        """A token for each row of ``logits`` (B, V) but for what is ``changed``, or UNSURE."""
        ...


def is_fast(seq: Sequence) -> bool:
    """True where a fast sampler may draw for the sequence at all."""
    params = seq.params
    if params.xtc_probability or params.top_n_sigma > 0:
        return False
    return seq.generator is None and params.typical_p >= 1


class TorchFastSampler:
    """Meets FastSampler, on a CPU. Reuses memory: large tensors take longer to get than to fill."""

    applies_masks = False

    def __init__(self) -> None:
        self._steps = torch.zeros(0, dtype=torch.int64)

    def __call__(
        self, logits: Tensor, sequences: list[Sequence], changed: ChangedRows = NO_CHANGES
    ) -> list[int]:
        """See FastSampler."""
        if logits.device.type != "cpu" or logits.dtype != torch.float32:
            return [UNSURE] * len(sequences)
        self._reserve(logits.shape[1])
        best, finite = likeliest(logits)
        for row, own in changed.logits.items():
            (best[row],), (finite[row],) = likeliest(own[None])
        return [
            self._drawn(changed.logits.get(row, logits[row]), seq, token)
            if ok and is_fast(seq)
            else UNSURE
            for row, (seq, token, ok) in enumerate(zip(sequences, best, finite, strict=True))
        ]

    def _reserve(self, size: int) -> None:
        if len(self._steps) != size:
            self._steps = torch.arange(size) * rng.signed(rng.GAMMA)
            self._hash, self._shifted = (torch.empty(size, dtype=torch.int64) for _ in range(2))
            self._shares, self._scores = (torch.empty(size) for _ in range(2))

    def _drawn(self, logits: Tensor, seq: Sequence, best: int) -> int:
        """Of one row (V,), whose likeliest token is ``best``."""
        params = seq.params
        if params.temperature == 0:
            return best
        if params.top_k or not TINY < params.temperature < 1 / TINY:
            return UNSURE  # a few of the likeliest are found quickly by the definition
        torch.sub(logits, logits[best], out=self._shares)
        self._shares.div_(torch.tensor(params.temperature, dtype=torch.float32)).exp_()
        key = rng.step_key(seq.seed, seq.num_output)
        self._find_scores(key)
        floor = NEVER
        while True:
            self._scores.masked_fill_(self._shares <= floor, 0)
            winner = self._winner(key, best)
            if winner == UNSURE:
                return UNSURE
            passes = self._passes(float(self._shares[winner]), params)
            if passes is None:
                return UNSURE
            if passes:
                return winner
            floor = float(self._shares[winner])

    def _find_scores(self, key: int) -> None:
        """Fill in, for every token, a number that is not below its share over its noise."""
        x, shifted = self._hash, self._shifted
        torch.add(self._steps, key, out=x)
        rng.mix(x, shifted)
        x.bitwise_not_().bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
        torch.div(self._shares, self._scores.copy_(x).mul_(2.0**-53), out=self._scores)

    def _winner(self, key: int, best: int) -> int:
        most = int(self._scores.argmax())
        bound = min(self._exact(key, torch.tensor([most])).item(), 1e30)
        candidates = (self._scores >= bound * (1 - 2 * CLOSE)).nonzero()[:, 0]
        exact = self._exact(key, candidates)
        if len(candidates) == 1:
            return int(candidates[0]) if bool(exact.isfinite()) else UNSURE
        values, places = exact.topk(2)
        first, second = values.tolist()
        is_sure = first < torch.inf and second < first * (1 - CLOSE)
        return int(candidates[places[0]]) if is_sure else UNSURE

    def _exact(self, key: int, tokens: Tensor) -> Tensor:
        """The scores (K,) of ``tokens`` (K,), float64."""
        drawn = rng.exponential(torch.tensor([key]), tokens)[0]
        return self._shares[tokens].double() / drawn.abs()  # no noise at all: infinite

    def _passes(self, share: float, params: SamplingParams) -> bool | None:
        """True where the filters keep a token; None if it is not clear."""
        if params.min_p > 0 and abs(share - params.min_p) <= CLOSE * params.min_p:
            return None
        if share < params.min_p:
            return False
        if params.top_p >= 1:
            return True
        room = float(self._shares.sum())
        most, least = (self._from(share * (1 + sign * EQUAL)) for sign in (-1, 1))
        if most == share or most - share < params.top_p * (1 - SUM_ERROR) * room:
            return True
        return False if least > params.top_p * (1 + SUM_ERROR) * room else None

    def _from(self, least: float) -> float:
        """The sum of the shares from ``least`` on."""
        return float((self._shares * (self._shares >= least)).sum())


def likeliest(logits: Tensor) -> tuple[list[int], list[bool]]:
    """The first of the largest numbers of each row (B, V), and whether all in it are usable.

    In two steps: torch's own argmax takes ten times as long as its maximum.
    """
    size = logits.shape[1]
    whole = size // GROUP * GROUP
    tops = logits[:, :whole].reshape(len(logits), -1, GROUP).amax(-1)  # (B, V / GROUP)
    if whole < size:
        tops = torch.cat([tops, logits[:, whole:].amax(-1, keepdim=True)], -1)
    best, groups = tops.max(-1, keepdim=True)  # (B, 1); a NaN in a row comes out as best
    places = (groups * GROUP + torch.arange(GROUP)).clamp_max_(size - 1)
    first = logits.gather(1, places).argmax(-1, keepdim=True)
    tokens = places.gather(1, first)[:, 0]
    return tokens.tolist(), torch.isfinite(best[:, 0]).tolist()


def largest(numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As ``topk`` of (V,), which takes four times as long."""
    whole = len(numbers) // GROUP * GROUP
    if whole < 8 * count * GROUP:
        return numbers.topk(count)
    groups = numbers[:whole].reshape(-1, GROUP).amax(-1).topk(count).indices
    places = (groups[:, None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten()
    places = torch.cat([places, torch.arange(whole, len(numbers), device=groups.device)])
    values, indices = numbers[places].topk(count)
    return values, places[indices]
