"""Questions about given tokens, as jobs; see ``base.Inspector``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from transformers_api.engine.base import Engine
from transformers_api.errors import AttentionUnavailable, ModelNotCapable
from transformers_api.inspection import matrices
from transformers_api.inspection.attention import AttentionSource
from transformers_api.inspection.attribution import attribute, check_gradients
from transformers_api.inspection.attribution_question import Attribution, AttributionQuestion
from transformers_api.inspection.base import (
    Anatomy,
    Array,
    AttentionWindow,
    HeadGrid,
    Heads,
    Job,
    PromptReading,
)
from transformers_api.inspection.divergence import diverge
from transformers_api.inspection.divergence_question import Divergence, DivergenceQuestion
from transformers_api.inspection.edit_plan import EditPlan, EditTally
from transformers_api.inspection.editable import Editable, Part
from transformers_api.inspection.edits import EditedText
from transformers_api.inspection.grid_question import Grid, GridQuestion
from transformers_api.inspection.grids import run_grid
from transformers_api.inspection.lens_maps import (
    DirectionReading,
    LensFit,
    LensMaps,
    LensTable,
)
from transformers_api.inspection.lenses import fit_lens, read_direction
from transformers_api.inspection.logit_parts import split
from transformers_api.inspection.logit_share import LogitParts, LogitPartsQuestion
from transformers_api.inspection.parts import Parts
from transformers_api.inspection.places import ActingCheck
from transformers_api.inspection.reading import Way
from transformers_api.inspection.residuals import (
    read_hidden_states,
    read_lens,
    read_prompt,
)
from transformers_api.inspection.served_parts import served_parts


class ModelInspector:
    """Meets ``base.Inspector``. It knows names and keeps no model alive: each job is given it.

    ``slice_tokens``: read between two decode steps; where not ``reads_in_chunks``, all at once.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        parts: Parts,
        source: AttentionSource,
        check: ActingCheck,
        *,
        slice_tokens: int,
        reads_in_chunks: bool,
    ) -> None:
        self.anatomy = anatomy
        self.source = source
        self._check = check
        self._engine: Engine = check.engine
        self.way = Way(
            parts=parts,
            vocab_size=anatomy.vocab_size,
            slice_tokens=slice_tokens,
            reads_in_chunks=reads_in_chunks,
        )

    def edited(self, plan: EditPlan) -> ModelInspector:
        """See ``base.Inspector``."""
        other = copy.copy(self)
        text = EditedText(plan, self.way.parts, self.anatomy.attention, self.source)
        other.way = replace(self.way, edits=text)
        return other

    def served_by(self, engine: Engine) -> ModelInspector:
        """See ``base.Inspector``."""
        other = copy.copy(self)
        other._engine = engine
        return other

    def attention(
        self,
        ids: Sequence[int],
        layer: int,
        heads: Heads,
        rows: tuple[int, int],
        cols: tuple[int, int],
    ) -> Job[AttentionWindow]:
        """See ``base.Inspector``. Raises AttentionUnavailable."""
        attention = self.anatomy.attention[layer]
        if not attention.available:
            raise AttentionUnavailable(
                f"layer {layer} has no attention weights: {attention.reason}"
            )
        return lambda model: matrices.attention(
            model, self.way, self.source, list(ids), layer, heads, rows, cols
        )

    def heads(self, ids: Sequence[int], thumb: int) -> Job[HeadGrid]:
        """See ``base.Inspector``."""
        sizes = self.anatomy.layers, self.anatomy.heads
        return lambda model: matrices.grid(model, self.way, self.source, list(ids), thumb, *sizes)

    def rollout(self, ids: Sequence[int], layers: tuple[int, int], drop_first: bool) -> Job[Array]:
        """See ``base.Inspector``. Raises AttentionUnavailable, PromptTooLarge."""
        within = range(layers[0], layers[1] + 1)
        attending = set(within) & set(self.anatomy.layers_with_attention)
        matrices.check_rollout(len(ids), len(within), len(attending))
        return lambda model: matrices.rollout(
            model, self.way, self.source, list(ids), layers, drop_first
        )

    def read_prompt(self, ids: Sequence[int], topk: int) -> Job[PromptReading]:
        """See ``base.Inspector``."""
        return lambda model: read_prompt(model, self.way, list(ids), topk)

    def lens(
        self,
        ids: Sequence[int],
        layers: Sequence[int],
        positions: Sequence[int],
        topk: int,
        target: int | None,
        via: LensMaps | None = None,
    ) -> Job[LensTable]:
        """See ``base.Inspector``. Raises ModelNotCapable."""
        self._require(self.anatomy.lens, "does not show a residual stream that its head can read")
        return lambda model: read_lens(
            model, self.way, list(ids), list(layers), list(positions), topk, target, via
        )

    def fit_lens(self, ids: Sequence[int], lens: LensMaps, most: int) -> Job[LensFit]:
        """See ``base.Inspector``."""
        return lambda model: fit_lens(model, self.way, list(ids), lens, most)

    def read_direction(
        self, ids: Sequence[int], direction: Array, topk: int
    ) -> Job[DirectionReading]:
        """See ``base.Inspector``."""
        return lambda model: read_direction(model, self.way, list(ids), direction, topk)

    def hidden_states(
        self, ids: Sequence[int], layers: Sequence[int], positions: Sequence[int]
    ) -> Job[Array]:
        """See ``base.Inspector``. Raises ModelNotCapable."""
        self._require(bool(self.way.parts.layers), "does not show a residual stream")
        return lambda model: read_hidden_states(
            model, self.way, list(ids), list(layers), list(positions)
        )

    def attribute(self, ids: Sequence[int], question: AttributionQuestion) -> Job[Attribution]:
        """See ``base.Inspector``."""
        return lambda model: attribute(model, self.way, list(ids), question)

    def part_numbers(
        self, ids: Sequence[int], places: Sequence[tuple[int, Part]]
    ) -> Job[list[Array]]:
        """See ``base.Inspector``."""
        parts, engine = self.way.parts, self._engine
        return lambda model: served_parts(engine, model, parts, list(ids), list(places))

    def logit_parts(self, ids: Sequence[int], question: LogitPartsQuestion) -> Job[LogitParts]:
        """See ``base.Inspector``. Raises ModelNotCapable."""
        return lambda model: split(model, self.way, self.source, self.anatomy, list(ids), question)

    def grid(self, ids: Sequence[int], question: GridQuestion) -> Job[Grid]:
        """See ``base.Inspector``. Raises ModelNotCapable, InvalidRequest, PromptTooLarge."""
        plan, way = question.donor_plan, replace(self.way, edits=None)
        if plan is not None:
            way = self.edited(plan).way
        return lambda model: run_grid(model, self.way, way, self.anatomy, list(ids), question)

    def diverge(self, ids: Sequence[int], question: DivergenceQuestion) -> Job[Divergence]:
        """See ``base.Inspector``. Raises InterventionFailed."""
        plan, edited = question.plan, None
        if plan is not None:  # these edits are not counted: they are not those of the answer
            edited = self.edited(replace(plan, tally=EditTally())).way
        return lambda model: diverge(
            model, self.way, edited, list(ids), list(question.answer), question.topk
        )

    def check_places(self) -> Job[Editable]:
        """See ``base.Inspector``."""
        return self._check.run

    def check_gradients(self) -> Job[bool]:
        """See ``base.Inspector``."""
        return lambda model: check_gradients(model, self.way)

    def _require(self, can: bool, what: str) -> None:
        if not can:
            raise ModelNotCapable(f"model type {self.anatomy.model_type} {what}")
