"""The data of grids of changes, for the rest of the program. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
from numpy.typing import NDArray

Metric = Literal["logit_difference", "logprob", "prob"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One change: a part of a layer, at one position or all, of one head or all."""

    layer: int
    position: int | None = None
    head: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GridQuestion:
    """The question what one token is worth after each of many changes, one at a time.

    ``donor``: tokens, as many as are read, whose numbers are put in; None: zeros.
    """

    part: Literal["resid", "attn", "mlp", "head"]
    cells: Sequence[Cell]
    donor: Sequence[int] | None = None
    answer: int | None = None  # None: the donor's own choice, or that of the text that is read
    against: int | None = None  # None: the choice of the text that is read, where it is another
    metric: Metric = "logit_difference"
    within_s: float = math.inf  # what all of it may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The metric of the last position's prediction: after each change, without one, the donor's."""

    values: NDArray[numpy.float32]  # (cells,)
    plain: float
    donor: float | None
    answer: int
    against: int | None  # None: there is none, or the metric has no use for it
