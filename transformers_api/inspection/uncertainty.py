"""Plain data of how sure a model is of a token. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """Figures of one prediction, before temperature and filters.

    ``settled_layer`` and ``lens_kl`` are of the layers that the lens was asked for.
    """

    entropy: float  # nats
    varentropy: float  # nats squared: the variance of the surprisal
    margin: float  # the probability of the first choice less that of the second
    settled_layer: int | None = None  # the first from which the lens' first choice stays
    lens_kl: float | None = None  # nats: of the last of its layers from the middle one


def settled_layer(choices: Sequence[tuple[int, int]]) -> int | None:
    """Of (layer, first choice) pairs, the first layer from which the choice stays as it is."""
    settled = None
    ordered = sorted(choices)
    for layer, token_id in reversed(ordered):
        if token_id != ordered[-1][1]:
            break
        settled = layer
    return settled


def agreement(answers: Sequence[Sequence[int]]) -> dict[str, float | int]:
    """The agreement of several answers to one prompt: token ids of each.

    ``share``: of the largest group of equal answers; ``distinct`` answers; ``prefix``: the mean
    over pairs of the part of the longer one up to the first difference.
    """
    texts = [tuple(answer) for answer in answers]
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[:i]]
    return {
        "share": max(map(texts.count, texts)) / len(texts),
        "distinct": len(set(texts)),
        "prefix": sum(_common(a, b) for a, b in pairs) / len(pairs),
    }


def _common(a: Sequence[int], b: Sequence[int]) -> float:
    longest = max(len(a), len(b))
    differing = (place for place, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(a), len(b))) / longest if longest else 1.0
