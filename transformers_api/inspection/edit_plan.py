"""Plain data of interventions: which numbers are changed, of which tokens, and how. Torch-free.

An edit changes one part of one layer for some positions of one sequence. Positions are those of the
tokens that the model reads, from 0. Arrays are float32; C is the width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers_api.errors import InsufficientPermissions, InvalidRequest
from transformers_api.inspection.base import Array
from transformers_api.inspection.editable import Part
from transformers_api.inspection.sae import FeatureEdit

Do = Literal["add", "erase", "scale", "set", "copy", "block", "temper", "feature"]
Range = tuple[int, int | None]  # positions [start, stop); None: without an end


class InterventionsDisabled(InsufficientPermissions):
    """INTERVENE_ENABLED is off."""

    code = "intervene_disabled"

    def __init__(self) -> None:
        super().__init__("Interventions are disabled on this server")


class InterventionFailed(InvalidRequest):
    """An edit made numbers that are not finite, or too large to go on with."""

    code = "intervention_failed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """One change of one part of a layer.

    ``add``: z + ``vector``. ``erase``: z without its projection on the rows of ``vector``, which
    are orthonormal. ``scale``: ``by`` times z. ``set``: ``vector``, or where ``is_aligned`` its
    first row at the first position, and so on. ``feature``: see FeatureEdit. z is a row of the
    part, of heads or of neurons.
    ``copy``: z as it was; whole rows are added to ``copies``.

    Of the attention weights of heads: ``block``: these queries read nothing from ``keys``.
    ``temper``: their scores are divided by ``by``, the temperature.
    """

    do: Do
    part: Part
    layer: int  # -1: the embedding
    positions: tuple[Range, ...]
    units: tuple[int, ...] = ()  # heads or neurons
    vector: Array | None = None  # (width,); (k, width) orthonormal; or (n, …), aligned
    by: float = 1.0
    is_aligned: bool = False
    keeps_norm: bool = False  # each row is as long as it was
    keys: tuple[Range, ...] = ()
    feature: FeatureEdit | None = None
    copies: list[Array] | None = None  # (n, width) each

    @property
    def first(self) -> int:
        """The first position that is changed: no query reads from a key behind it."""
        first = min(start for start, _ in self.positions)
        return max(first, min((start for start, _ in self.keys), default=0))


@dataclass(slots=True)
class EditTally:
    """The edits of a sequence so far; written by the engine thread."""

    tokens: int = 0  # tokens times edits
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class EditPlan:
    """The edits of one sequence, in their order. Meets ``engine.base.Edits``.

    ``identity``: the same for plans that do the same to the same tokens.
    """

    edits: tuple[Edit, ...]
    identity: str
    tally: EditTally = field(default_factory=EditTally)

    @property
    def unedited(self) -> int:
        """Tokens from the start that are read as without edits."""
        return min(edit.first for edit in self.edits)

    @property
    def parts(self) -> set[tuple[int, Part]]:
        """The layers and parts of them that are changed."""
        return {(edit.layer, edit.part) for edit in self.edits}

    @property
    def places(self) -> int:
        """The number of these."""
        return len(self.parts)

    @property
    def attention(self) -> dict[int, list[Edit]]:
        """The edits of attention weights, by layer."""
        by_layer: dict[int, list[Edit]] = {}
        for edit in self.edits:
            if edit.part == "weights":
                by_layer.setdefault(edit.layer, []).append(edit)
        return by_layer
