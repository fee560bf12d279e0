"""The parts of a model that can be changed, as plain data. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["resid", "attn", "mlp", "head", "neuron", "q", "k", "v", "weights"]
PARTS: tuple[Part, ...] = ("resid", "attn", "mlp", "head", "neuron")  # what modules make
INPUTS: tuple[Part, ...] = ("q", "k", "v")  # of attention; its weights have edits of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The parts of one layer that can be changed; layer -1 is the embedding.

    ``off``: of each that is there, what an edit gives beside the same edit of the model's modules,
    relative. Those of ``unverified`` give something else.
    """

    layer: int
    off: Mapping[Part, float] = field(default_factory=dict)
    unverified: frozenset[Part] = frozenset()
    heads: int = 0
    head_dim: int = 0
    neurons: int = 0
    inputs: Mapping[Part, tuple[int, int]] = field(default_factory=dict)  # heads, numbers of each

    def can(self, part: Part) -> bool:
        """True where the part can be changed, which has been verified."""
        return part in self.off and part not in self.unverified

    @property
    def verified(self) -> float | None:
        """The worst of what can be changed; None: nothing can."""
        return max((off for part, off in self.off.items() if self.can(part)), default=None)


@dataclass(frozen=True, slots=True)
class Editable:
    """The parts of a model that can be changed: those of the embedding, then of each layer.

    ``neighbours_are_equal``: no bit of a sequence depends on the edits of others in its passes.
    """

    places: tuple[Places, ...] = ()
    neighbours_are_equal: bool = False

    def of(self, layer: int) -> Places:
        """Those of one layer; -1 is the embedding."""
        return self.places[layer + 1]
