"""Questions about given tokens, as plain data: whoever asks may be far from the model.

Each knows the job that answers it (``job``), which runs beside the model; the answers are plain
data too. See ``base.Inspector`` for what they ask.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from transformers_api.inspection import (
    attribution_question,
    base,
    divergence_question,
    editable,
    grid_question,
    lens_maps,
    logit_share,
)
from transformers_api.inspection.base import Array, Heads, Inspector, Job
from transformers_api.inspection.edit_plan import EditPlan

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Inspected(Protocol):
    """A model that questions may be asked of."""

    @property
    def anatomy(self) -> base.Anatomy:
        """The anatomy, which says what can be asked."""
        ...


class Question(Protocol[T_co]):
    """Asks something of a model."""

    def job(self, inspector: Inspector) -> Job[T_co]:
        """The job that answers it."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionWindow:
    """See ``Inspector.attention``."""

    ids: Sequence[int]
    layer: int
    heads: Heads
    rows: tuple[int, int]
    cols: tuple[int, int]

    def job(self, inspector: Inspector) -> Job[base.AttentionWindow]:
        """See Question."""
        return inspector.attention(self.ids, self.layer, self.heads, self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class HeadGrid:
    """See ``Inspector.heads``."""

    ids: Sequence[int]
    thumb: int

    def job(self, inspector: Inspector) -> Job[base.HeadGrid]:
        """See Question."""
        return inspector.heads(self.ids, self.thumb)


@dataclass(frozen=True, slots=True)
class Rollout:
    """See ``Inspector.rollout``."""

    ids: Sequence[int]
    layers: tuple[int, int]
    drop_first: bool

    def job(self, inspector: Inspector) -> Job[Array]:
        """See Question."""
        return inspector.rollout(self.ids, self.layers, self.drop_first)


@dataclass(frozen=True, slots=True)
class PromptReading:
    """See ``Inspector.read_prompt``."""

    ids: Sequence[int]
    topk: int

    def job(self, inspector: Inspector) -> Job[base.PromptReading]:
        """See Question."""
        return inspector.read_prompt(self.ids, self.topk)


@dataclass(frozen=True, slots=True)
class Lens:
    """See ``Inspector.lens``."""

    ids: Sequence[int]
    layers: Sequence[int]
    positions: Sequence[int]
    topk: int
    target: int | None
    via: lens_maps.LensMaps | None = None

    def job(self, inspector: Inspector) -> Job[lens_maps.LensTable]:
        """See Question."""
        return inspector.lens(
            self.ids, self.layers, self.positions, self.topk, self.target, self.via
        )


@dataclass(frozen=True, slots=True)
class LensFit:
    """See ``Inspector.fit_lens``."""

    ids: Sequence[int]
    lens: lens_maps.LensMaps
    most: int

    def job(self, inspector: Inspector) -> Job[lens_maps.LensFit]:
        """See Question."""
        return inspector.fit_lens(self.ids, self.lens, self.most)


@dataclass(frozen=True, slots=True)
class DirectionReading:
    """See ``Inspector.read_direction``."""

    ids: Sequence[int]
    direction: Array
    topk: int

    def job(self, inspector: Inspector) -> Job[lens_maps.DirectionReading]:
        """See Question."""
        return inspector.read_direction(self.ids, self.direction, self.topk)


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """See ``Inspector.hidden_states``."""

    ids: Sequence[int]
    layers: Sequence[int]
    positions: Sequence[int]

    def job(self, inspector: Inspector) -> Job[Array]:
        """See Question."""
        return inspector.hidden_states(self.ids, self.layers, self.positions)


@dataclass(frozen=True, slots=True)
class Attribution:
    """See ``Inspector.attribute``."""

    ids: Sequence[int]
    question: attribution_question.AttributionQuestion

    def job(self, inspector: Inspector) -> Job[attribution_question.Attribution]:
        """See Question."""
        return inspector.attribute(self.ids, self.question)


@dataclass(frozen=True, slots=True)
class Gradients:
    """See ``Inspector.check_gradients``."""

    def job(self, inspector: Inspector) -> Job[bool]:
        """See Question."""
        return inspector.check_gradients()


@dataclass(frozen=True, slots=True)
class PartNumbers:
    """See ``Inspector.part_numbers``."""

    ids: Sequence[int]
    places: Sequence[tuple[int, editable.Part]]

    def job(self, inspector: Inspector) -> Job[list[Array]]:
        """See Question."""
        return inspector.part_numbers(self.ids, self.places)


@dataclass(frozen=True, slots=True)
class LogitParts:
    """See ``Inspector.logit_parts``."""

    ids: Sequence[int]
    question: logit_share.LogitPartsQuestion

    def job(self, inspector: Inspector) -> Job[logit_share.LogitParts]:
        """See Question."""
        return inspector.logit_parts(self.ids, self.question)


@dataclass(frozen=True, slots=True)
class Grid:
    """See ``Inspector.grid``."""

    ids: Sequence[int]
    question: grid_question.GridQuestion

    def job(self, inspector: Inspector) -> Job[grid_question.Grid]:
        """See Question."""
        return inspector.grid(self.ids, self.question)


@dataclass(frozen=True, slots=True)
class Divergence:
    """See ``Inspector.diverge``."""

    ids: Sequence[int]
    question: divergence_question.DivergenceQuestion

    def job(self, inspector: Inspector) -> Job[divergence_question.Divergence]:
        """See Question."""
        return inspector.diverge(self.ids, self.question)


@dataclass(frozen=True, slots=True)
class Pushes:
    """Several of ``Inspector.diverge`` about one text, one after the other."""

    ids: Sequence[int]
    compared: Sequence[divergence_question.DivergenceQuestion]

    def job(self, inspector: Inspector) -> Job[list[divergence_question.Divergence]]:
        """See Question."""
        jobs = [inspector.diverge(self.ids, question) for question in self.compared]

        def run(model: Any) -> Generator[None, None, list[divergence_question.Divergence]]:
            moved = []
            for job in jobs:
                moved.append((yield from job(model)))
            return moved

        return run


@dataclass(frozen=True, slots=True)
class Places:
    """See ``Inspector.check_places``."""

    def job(self, inspector: Inspector) -> Job[editable.Editable]:
        """See Question."""
        return inspector.check_places()


@dataclass(frozen=True, slots=True)
class Edited(Generic[T]):
    """The same question of a model that reads with edits; see ``Inspector.edited``."""

    question: Question[T]
    plan: EditPlan

    def job(self, inspector: Inspector) -> Job[T]:
        """See Question."""
        return self.question.job(inspector.edited(self.plan))
