"""The data of a comparison of edited and unedited predictions, for the rest of the program.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceQuestion:
    """The question how far edits push the predictions of an answer.

    ``plan``: the edits, an ``edit_plan.EditPlan``; None: there are none, and nothing is pushed.
    """

    answer: Sequence[int]  # tokens, which follow those that were there before
    plan: Any
    topk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The predictions of each of T tokens: natural logarithms, before temperature and penalties."""

    kl: NDArray[numpy.float32]  # (T,) of the edited from the unedited, nats
    logprob_without: NDArray[numpy.float32]  # (T,) of the token, unedited
    top_ids: NDArray[numpy.int64]  # (T, k) the likeliest, unedited
    top_logprobs: NDArray[numpy.float32]  # (T, k)
