"""Plain data of lenses: maps of residual streams before the head reads them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LensMaps:
    """A map of the stream h after each of some layers; that of other layers is read as it is.

    ``tuned``: h + A h + b (Belrose and others 2023, arXiv:2303.08112); ``jacobian``: J h.
    """

    kind: Literal["tuned", "jacobian"]
    layers: tuple[int, ...]  # -1: the embedding
    maps: NDArray[numpy.float32]  # (L', C, C)
    biases: NDArray[numpy.float32] | None = None  # (L', C)

    @property
    def width(self) -> int:
        """Numbers of a stream."""
        return int(self.maps.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class LensFit:
    """The mean KL divergence, in nats, of the model's predictions from those after each layer."""

    layers: tuple[int, ...]
    lens: tuple[float, ...]  # through the lens
    plain: tuple[float, ...]  # through the head alone


@dataclass(frozen=True, slots=True)
class DirectionReading:
    """The tokens that a change of the stream makes likelier, or less so, with their logits'."""

    raised: tuple[tuple[int, float], ...]
    lowered: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LensTable:
    """Residual streams read through the model's own head: (P positions, L' layers, …)."""

    top_ids: NDArray[numpy.int64]  # (P, L', k)
    top_probs: NDArray[numpy.float32]
    entropy: NDArray[numpy.float32]  # (P, L')
    target_ids: NDArray[numpy.int64]  # (P,): the target, or the model's own choice there
    target_rank: NDArray[numpy.int64]  # (P, L')
    target_prob: NDArray[numpy.float32]
