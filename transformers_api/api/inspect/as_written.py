"""Questions about a recent answer, answered by the passes that write it: `how: "as_written"`.

The answer is written again, each token being the one that was written, by the engine that serves:
its prompt in the same pieces, then step by step. So a row is the one of the stream to the bit,
where no bit of a sequence depends on its company; read at once, rows differ by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from transformers_api.api.inspect import subjects
from transformers_api.api.inspect.subjects import Subject
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import AttentionUnavailable, InvalidRequest
from transformers_api.inspection.base import (
    AttentionWindow,
    Heads,
    StepTrace,
    TracePlan,
)
from transformers_api.inspection.lens_maps import LensTable
from transformers_api.serving.generation import GenerationRequest, collect
from transformers_api.serving.inspect.run_file import joined

AT_ONCE, AS_WRITTEN = "at_once", "as_written"
# What shares of attention may be off by that are read at once, and streams and logits relative to
# their size; larger where numbers are rounded.
EXACT, ROUNDED = 1e-4, 2e-2


def header(subject: Subject, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say how a recent answer was read; {} for another text."""
    if subject.completion is None:
        return {}
    if body["how"] == AS_WRITTEN:
        return {"how": AS_WRITTEN}
    differs = EXACT if subject.anatomy.dtype == "float32" else ROUNDED
    return {"how": AT_ONCE, "differs_up_to": differs}


@dataclass(frozen=True)
class Writing:
    """A recent answer that is to be written again."""

    subject: Subject

    @property
    def first(self) -> int:
        """The position of the query that predicted the first token."""
        assert self.subject.completion is not None
        return len(self.subject.completion.prompt_ids) - 1

    @property
    def last(self) -> int:
        """The position of the last token that was read: all but the last of all."""
        return len(self.subject.ids) - 2

    def check(self, positions: Sequence[int], field: str, *, of_prompt: bool = False) -> None:
        """Raise InvalidRequest for positions that no pass of the stream showed."""
        first = 0 if of_prompt else self.first
        if not all(first <= position <= self.last for position in positions):
            raise InvalidRequest(
                f'{field} must be in [{first}, {self.last}] with how "{AS_WRITTEN}": those of the '
                "tokens that predicted the answer's",
                param=field,
            )

    def positions(self, requested: Sequence[int] | str) -> list[int]:
        """Places of tokens; "all": those that predicted the answer's. Raises InvalidRequest."""
        if isinstance(requested, str):
            return list(range(self.first, self.last + 1))
        return subjects.positions(requested, len(self.subject.ids))

    def steps(self, plan: TracePlan) -> list[StepTrace]:
        """The notes of each token. Raises what a traced answer does."""
        subject, completion = self.subject, self.subject.completion
        assert completion is not None
        params = SamplingParams(
            max_tokens=len(completion.token_ids),
            temperature=0.0,
            ignore_eos=True,
            forced=dict(enumerate(completion.token_ids)),
        )
        written = GenerationRequest(
            [completion.prompt_ids],
            params,
            trace=plan,
            trace_stops=True,
            edits=() if subject.edits is None else (subject.edits,),
        )
        generation = subject.context.start(subject.model, written, is_streamed=True)
        (choice,) = collect(generation)
        return list(choice.traces)


def of(subject: Subject, body: Mapping[str, Any]) -> Writing | None:
    """The answer to be written again; None where it is read at once. Raises InvalidRequest."""
    if body["how"] == AT_ONCE:
        return None
    completion = subject.completion
    if completion is None:
        raise InvalidRequest(f'how "{AS_WRITTEN}" needs a completion_id', param="how")
    if not completion.token_ids:
        raise InvalidRequest("nothing was written to this prompt", param="completion_id")
    if subject.is_truncated:
        raise InvalidRequest(
            f'how "{AS_WRITTEN}" is of texts that the model sees whole', param="how"
        )
    return Writing(subject)


def with_rows(body: Mapping[str, Any], writing: Writing) -> dict[str, Any]:
    """``body`` with its rows, by default those that the stream showed. Raises InvalidRequest."""
    rows = body.get("rows", [writing.first, writing.last + 1])
    if rows[0] < rows[1]:
        writing.check([rows[0], rows[1] - 1], "rows")
    return {**body, "rows": rows}


def attention(
    writing: Writing, layer: int, heads: Heads, rows: tuple[int, int], cols: tuple[int, int]
) -> AttentionWindow:
    """The rows of one layer's attention that the stream showed."""
    if not writing.subject.anatomy.traces_attention:
        raise AttentionUnavailable(
            "The attention of this model cannot be shown while it writes", param="how"
        )
    chosen = (heads,) if isinstance(heads, int) else None if heads == "all" else heads
    noted_rows = [
        step.attention[0] for step in writing.steps(TracePlan(layers=(layer,), heads=chosen))
    ][rows[0] - writing.first : rows[1] - writing.first]
    shape = len(noted_rows[0].weights), len(noted_rows), len(writing.subject.ids)
    weights, sinks = numpy.zeros(shape, numpy.float32), numpy.zeros(shape[:2], numpy.float32)
    for place, row in enumerate(noted_rows):
        weights[:, place, row.key_start : row.key_start + row.width] = row.weights
        if row.sink is not None:
            sinks[:, place] = row.sink
    sink = None if noted_rows[0].sink is None else sinks
    return AttentionWindow(weights=weights[:, :, slice(*cols)], sink=sink)


def states(writing: Writing, layers: Sequence[int], places: Sequence[int]) -> Any:
    """(L', P, C): the residual stream as the passes had it, float32."""
    writing.check(places, "positions", of_prompt=True)
    records = tuple((layer, "resid") for layer in dict.fromkeys(layers))
    steps = writing.steps(TracePlan(records=records))  # type: ignore[arg-type]  # literals
    parts = joined([rows for step in steps for rows in step.recorded])
    return numpy.stack([parts[layer, "resid"].values[list(places)] for layer in layers])


def lens(writing: Writing, layers: Sequence[int], places: Sequence[int], topk: int) -> LensTable:
    """The lens' readings that the stream had; the target is the token that was written."""
    writing.check(places, "positions")
    plan = TracePlan(lens_layers=tuple(dict.fromkeys(layers)), lens_topk=topk)
    steps = writing.steps(plan)
    table = [
        [
            {each.layer: each for each in steps[place - writing.first].lens}[layer]
            for layer in layers
        ]
        for place in places
    ]
    return LensTable(
        top_ids=numpy.array([[cell.top.token_ids for cell in row] for row in table], numpy.int64),
        top_probs=numpy.array([[cell.top.probs for cell in row] for row in table], numpy.float32),
        entropy=numpy.array([[cell.entropy for cell in row] for row in table], numpy.float32),
        target_ids=numpy.array([steps[place - writing.first].token_id for place in places]),
        target_rank=numpy.array([[cell.rank_of_sampled for cell in row] for row in table]),
        target_prob=numpy.array(
            [[cell.prob_of_sampled for cell in row] for row in table], numpy.float32
        ),
    )
