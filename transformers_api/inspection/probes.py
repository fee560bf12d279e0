"""Plain data of probes: residual streams measured along directions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A direction (C,) for each of some layers, by the name that it is kept under."""

    name: str
    directions: dict[int, NDArray[numpy.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReading:
    """The stream along a direction: its length there, and its cosine with it; of each layer."""

    name: str
    layers: tuple[int, ...]
    projections: tuple[float, ...]
    cosines: tuple[float, ...]
