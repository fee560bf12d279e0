"""The data of grids of changes, for the rest of the program. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

Metric = Literal["logit_difference", "logprob", "prob"]
Method = Literal["exact", "gradient"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One change: a part of a layer, at one position or all, of one head or all."""

    layer: int
    position: int | None = None
    head: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Normal noise on the embeddings of some positions, drawn several times.

    ``size`` is in standard deviations of the numbers of the text's embeddings.
    """

    size: float
    positions: Sequence[int]
    samples: int = 10
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GridQuestion:
    """The question what one token is worth after each of many changes, one at a time.

    ``donor``: tokens, as many as are read, whose numbers are put in; None: zeros. They are read
    with the edits ``donor_plan``, an ``edit_plan.EditPlan`` or None. With ``noise``
    the text is read with it, and metrics are means over its samples. The method ``gradient`` is
    the linear guess of all cells at once, from one backward pass. With ``only_cells`` both tokens
    are as they are here, and nothing but the cells is worked out.
    """

    part: Literal["resid", "attn", "mlp", "head"]
    cells: Sequence[Cell]
    donor: Sequence[int] | None = None
    donor_plan: Any = None
    answer: int | None = None  # None: the donor's own choice, or that of the text that is read
    against: int | None = None  # None: the choice of the text that is read, where it is another
    metric: Metric = "logit_difference"
    noise: Noise | None = None
    method: Method = "exact"
    only_cells: bool = False
    within_s: float = math.inf  # what all of it may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The metric of the last position's prediction: after each change, without one, the donor's."""

    values: NDArray[numpy.float32]  # (cells,)
    plain: float  # NaN with ``only_cells``
    donor: float | None
    answer: int
    against: int | None  # None: there is none, or the metric has no use for it
    seconds: float = 0.0  # that the cells took, with whoever was beside them
