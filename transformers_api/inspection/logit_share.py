"""The data of a logit's parts, for the rest of the program. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitPartsQuestion:
    """The question what makes a logit; ``position`` is that of the query which predicts it."""

    position: int
    token_id: int | None = None  # None: the model's own choice
    against: int | Literal["mean"] | None = None  # less the logit of another, or the mean of all
    by: Literal["layer", "head", "neuron", "source"] = "layer"


@dataclass(frozen=True, slots=True)
class LogitShare:
    """The share of one part of the model in a logit.

    ``part``: "embed", "attn", "mlp", the name of a module that writes besides, "head", "neuron", or
    "source": what a head read from the token at ``position``. "edit": what edits added to ``of``,
    a part of the layer.
    """

    part: str
    layer: int  # -1: the embedding
    value: float
    index: int = -1  # of the head or neuron
    position: int = -1
    of: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitParts:
    """``logit`` = sum of the shares + ``constant`` + ``rounding``; ``sum`` is without the last."""

    token_id: int
    logit: float  # as the head gives it, less that of ``against``
    model_logit: float  # the same of what the model returns
    is_capped: bool  # the model bends the head's logits; else both are equal but for rounding
    shares: tuple[LogitShare, ...]
    constant: float  # biases
    rounding: float  # of the stream, which rounds after every layer
    sum: float

    def largest(self, count: int) -> list[int]:
        """The places of the ``count`` largest shares, the largest first, and of all edits'."""
        order = sorted(range(len(self.shares)), key=lambda at: -abs(self.shares[at].value))
        parts = [at for at in order if self.shares[at].part != "edit"][:count]
        chosen = {*parts, *(at for at in order if self.shares[at].part == "edit")}
        return [at for at in order if at in chosen]
