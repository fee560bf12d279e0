"""POST /inspect/patch and /inspect/ablate: every place of a model changed by turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import subjects
from transformers_api.api.inspect.schemas.grids import (
    AblateRequest,
    AblationGrid,
    PatchGrid,
    PatchRequest,
)
from transformers_api.api.inspect.subjects import Subject, opened
from transformers_api.errors import InvalidRequest
from transformers_api.inspection import questions
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.grid_question import Cell, Grid, GridQuestion
from transformers_api.serving.inspect import arrays
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint("grids", __name__, dialect=NIELS, description="Every place by turns")

ALIKE = 1e-6  # metrics of both prompts that leave no way between them
NO_WAY = "both prompts have the same metric: the grid has differences from the corrupt one's"
_PAIR = {"clean": "The capital of France is", "corrupt": "The capital of Italy is", "layers": [0]}


@blueprint.at("/inspect/patch", methods=["POST"])
@blueprint.takes(PatchRequest, example=_PAIR)
@blueprint.gives(PatchGrid)
@blueprint.gives(Failed, 413, description="Too much text, or a grid that would take too long")
def patch(body: dict[str, Any]) -> Any:
    """Put numbers of the clean prompt into the corrupt one, one place at a time.

    0 is the corrupt prompt's metric, 1 the clean one's: where the grid is near 1 lies what makes
    the difference. A grid that would take too long is refused once that is clear, with what fits.
    """
    inspect_auth.check()
    with RequestContext(services()) as context:
        model = context.lease(body.get("model"), is_chat=isinstance(body["clean"], list))
        inspector = subjects.inspector_of(model)
        sides = {name: subjects.side_ids(model, body[name], name) for name in ("clean", "corrupt")}
        subject = Subject(context=context, model=model, inspector=inspector, ids=sides["corrupt"])
        layers = _layers(body, inspector.anatomy)
        if body["part"] == "head":
            columns: Sequence[int] = ()
            cells = _by_head(inspector.anatomy, layers)
        else:
            columns = subjects.positions(body["positions"], len(subject.ids))
            cells = [Cell(layer, position) for layer in layers for position in columns]
        grid = _filled(subject, body, cells, body["part"], sides["clean"])
        assert grid.donor is not None
        way = grid.donor - grid.plain
        values = grid.values - grid.plain
        answer = {
            **_described(subject, body, layers, grid),
            **_rows(cells, values / way if abs(way) > ALIKE else values, columns, subject),
            "clean": arrays.digits(grid.donor),
            "corrupt": arrays.digits(grid.plain),
            "note": None if abs(way) > ALIKE else NO_WAY,
        }
        return answer


@blueprint.at("/inspect/ablate", methods=["POST"])
@blueprint.takes(AblateRequest, example={"prompt": "The capital of France is", "layers": [0]})
@blueprint.gives(AblationGrid)
@blueprint.gives(Failed, 413, description="Too much text, or a grid that would take too long")
def ablate(body: dict[str, Any]) -> Any:
    """Set each head, attention or MLP to zero by turns, and say how much it is missed.

    The number is the metric as it is less the metric without the part. One that is hardly missed
    may still matter: another can have done its work.
    """
    with opened(body) as subject:
        layers = _layers(body, subject.anatomy)
        part: Literal["attn", "mlp", "head"] = body["part"]
        cells = (
            _by_head(subject.anatomy, layers)
            if part == "head"
            else [Cell(layer) for layer in layers]
        )
        grid = _filled(subject, body, cells, part, None)
        return {
            **_described(subject, body, layers, grid),
            **_rows(cells, grid.plain - grid.values, (), subject),
            "plain": arrays.digits(grid.plain),
        }


def _layers(body: Mapping[str, Any], anatomy: Anatomy) -> list[int]:
    layers = subjects.layers(body["layers"], anatomy)
    if isinstance(body["layers"], list) and -1 in layers:
        raise InvalidRequest(f"layers must be in [0, {anatomy.layers - 1}]", param="layers")
    return sorted({layer for layer in layers if layer >= 0})


def _by_head(anatomy: Anatomy, layers: Sequence[int]) -> list[Cell]:
    return [
        Cell(layer, head=head) for layer in layers for head in range(anatomy.attention[layer].heads)
    ]


def _filled(
    subject: Subject,
    body: Mapping[str, Any],
    cells: list[Cell],
    part: Any,
    donor: Sequence[int] | None,
) -> Grid:
    for name in ("answer", "against"):
        if name in body:
            subjects.token(body[name], subject, name)
    if not cells:
        raise InvalidRequest("these layers have no heads", param="layers")
    question = GridQuestion(
        part=part,
        cells=cells,
        donor=donor,
        answer=body.get("answer"),
        against=body.get("against"),
        metric=body["metric"],
        within_s=subject.settings.inspect_timeout_s,
    )
    return subject.ask(questions.Grid(subject.ids, question))


def _described(
    subject: Subject, body: Mapping[str, Any], layers: list[int], grid: Grid
) -> dict[str, Any]:
    vocabulary = Vocabulary(subject.model.tokenizer)

    def named(token_id: int | None) -> dict[str, Any] | None:
        if token_id is None:
            return None
        return {"token_id": token_id, "token": vocabulary.decoded(token_id)}

    return {
        "part": body["part"],
        "metric": body["metric"],
        "answer": named(grid.answer),
        "against": named(grid.against),
        "layers": layers,
    }


def _rows(
    cells: Sequence[Cell],
    values: arrays.Numbers,
    columns: Sequence[int],
    subject: Subject,
) -> dict[str, Any]:
    """The grid, a row for each layer; those of layers with fewer heads end in null."""
    rows: dict[int, list[float]] = {}
    for cell, value in zip(cells, values.tolist(), strict=True):
        rows.setdefault(cell.layer, []).append(value)
    width = max(map(len, rows.values()))
    grid = numpy.full((len(rows), width), numpy.nan)
    for number, row in enumerate(rows.values()):
        grid[number, : len(row)] = row
    answer: dict[str, Any] = {"grid": arrays.significant(grid)}
    if columns:
        vocabulary = Vocabulary(subject.model.tokenizer)
        answer["positions"] = list(columns)
        answer["tokens"] = [vocabulary.decoded(subject.ids[column]) for column in columns]
    return answer
