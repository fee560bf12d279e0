"""A grid of changes filled by a job, some cells at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy

from transformers_api.errors import InspectionBusy
from transformers_api.inspection import questions
from transformers_api.inspection.base import Array
from transformers_api.inspection.grid_question import Grid, GridQuestion
from transformers_api.inspection.questions import Question
from transformers_api.serving.inspect.jobs import InspectionJob

Ask = Callable[[Question[Grid]], Grid]
FIRST_CELLS = 4  # by which the time is judged
TURN_S = 0.5  # that one question of a job takes, about
MOST_PER_TURN = 1024
PATIENCE_S = 5.0  # until a question that was refused is asked again


@dataclass(frozen=True)
class GridWork:
    """The question, and the values (cells,) that are there; NaN where they are not."""

    question: GridQuestion
    ids: Sequence[int]
    first: Grid  # of the first cells, with all that is the same for every cell
    values: Array

    @classmethod
    def begin(cls, ids: Sequence[int], question: GridQuestion, ask: Ask) -> GridWork:
        """The work with its first cells done, so that whatever is wrong is known at once."""
        few = replace(question, cells=question.cells[:FIRST_CELLS])
        first = ask(questions.Grid(ids, few))
        values = numpy.full(len(question.cells), numpy.nan, numpy.float32)
        values[: len(few.cells)] = first.values
        return cls(question, ids, first, values)

    @property
    def done(self) -> int:
        """Cells that were done in the beginning."""
        return len(self.first.values)

    @property
    def estimate_s(self) -> float:
        """The time that all cells take at the rate of the first ones."""
        return self.first.seconds / self.done * len(self.question.cells)

    def run(self, job: InspectionJob, ask: Ask, is_busy: Callable[[], bool]) -> None:
        """Fill what is left. Raises what ``ask`` does, but for InspectionBusy.

        While ``is_busy``, because others are being answered, half of the time is theirs alone.
        """
        done, cell_s = self.done, self.first.seconds / self.done
        job.advance(done)
        while done < len(self.values):
            count = min(max(int(TURN_S / max(cell_s, 1e-6)), 1), MOST_PER_TURN)
            cells = self.question.cells[done : done + count]
            question = replace(
                self.question,
                cells=cells,
                answer=self.first.answer,
                against=self.first.against,
                only_cells=True,
            )
            try:
                grid = ask(questions.Grid(self.ids, question))
            except InspectionBusy as error:
                job.pause(min(error.retry_after or 1.0, PATIENCE_S))
                continue
            self.values[done : done + len(cells)] = grid.values
            done += len(cells)
            cell_s = grid.seconds / len(cells)
            job.advance(done)
            if is_busy():
                job.pause(min(grid.seconds, PATIENCE_S))
