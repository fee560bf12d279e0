"""The data of attributions, for the rest of the program. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy
from numpy.typing import NDArray

AttributionMethod = Literal[
    "occlusion", "gradient_x_input", "gradient_norm", "integrated_gradients"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributionQuestion:
    """The question why this token; ``position`` is that of the query which predicts it."""

    position: int
    token_id: int | None = None  # None: the model's own choice
    method: AttributionMethod = "occlusion"
    steps: int | None = None  # of integrated gradients; None: doubled until nothing moves
    # Where its path begins: the first token as it is and the others as ``baseline_token_id``; or
    # all of them as the mean embedding, or as zeros.
    baseline: Literal["token", "mean", "zero"] = "mean"
    baseline_token_id: int = 0
    of: Literal["logprob", "logit"] = "logprob"
    groups: tuple[tuple[int, ...], ...] | None = None  # taken away together; None: each token
    screen: int = 0  # so many groups, those with the largest gradients; 0: all
    within_s: float = math.inf  # what occlusion may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """One score per token up to the query; NaN where nothing was asked."""

    scores: NDArray[numpy.float32]  # (position + 1,)
    token_id: int
    logprob: float
    value: float  # of what was asked for: the logprob or the logit
    convergence_delta: float | None = None  # f(x) - f(baseline) - sum, of integrated gradients
    steps: int | None = None  # that were made
    largest_change: float | None = None  # of a score, from half as many steps to these
    note: str | None = None
