"""Plain data of activations: numbers of parts of layers, as passes made them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

ActivationPart = Literal["resid", "attn", "mlp", "head", "neuron", "q", "k", "v"]
ACTIVATION_PARTS: tuple[ActivationPart, ...] = (
    *("resid", "attn", "mlp", "head", "neuron"),
    *("q", "k", "v"),
)
READ_BY_ATTENTION: tuple[ActivationPart, ...] = ("q", "k", "v")  # after rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """A part of a layer whose numbers are noted at every step.

    ``units``: of heads or neurons, or for k and v of heads of keys; (): all. ``topk``: only so many
    numbers of each head, or of all that have no heads: those of the largest size; 0: all.
    """

    part: ActivationPart
    layer: int  # -1: the embedding
    units: tuple[int, ...] = ()
    topk: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """The numbers of a part at the token that was read last, float32: (H', D), or (1, width)."""

    part: ActivationPart
    layer: int
    values: NDArray[numpy.float32]  # or (H', k) of the largest, the largest first
    places: NDArray[numpy.int64] | None = None  # (H', k): which these are


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRows:
    """Rows (n, width) of a part of a layer, of tokens from ``start`` on, in the stream's own bits.

    ``bits``: uint16 for 2 bytes each (``dtype`` says of what), else float32. The part is ``factor``
    times these numbers.
    """

    part: ActivationPart
    layer: int
    start: int
    bits: NDArray[Any]
    dtype: str  # "bfloat16", "float16", "float32"
    factor: float = 1.0


def numbers(bits: NDArray[Any], dtype: str) -> NDArray[numpy.float32]:
    """The float32 numbers of ``bits``, exactly."""
    if dtype == "bfloat16":
        return (bits.astype(numpy.uint32) << 16).view(numpy.float32)
    if dtype == "float16":
        return bits.view(numpy.float16).astype(numpy.float32)
    return bits.astype(numpy.float32)
