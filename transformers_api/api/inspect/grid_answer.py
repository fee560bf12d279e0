"""A grid of changes as an answer: JSON, an archive of numpy, a picture, a page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from transformers_api.inspection.base import Array
from transformers_api.inspection.grid_question import Cell, Grid
from transformers_api.serving.inspect import arrays, picture
from transformers_api.serving.text.vocabulary import Vocabulary

Json = dict[str, Any]
Form = Literal["json", "npz", "png", "html"]

ALIKE = 1e-6  # metrics of both prompts that leave no way between them
NO_WAY = "both prompts have the same metric: the grid has differences from the corrupt one's"
APPROXIMATE = "approximate: as far as the metric is linear in each change"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
table {{ border-collapse: collapse }}
td {{ min-width: 3em; padding: .2em .4em; text-align: right; border: 1px solid #ddd }}
th {{ padding: .2em .4em; font-weight: normal; color: #555 }}
</style>
<h1>{title}</h1>
<p>{text}</p>
<table>
{rows}
</table>
"""


@dataclass(frozen=True, kw_only=True)
class GridAnswer:
    """The part of an answer that is known before the first cell."""

    fields: Json  # part, metric, layers, positions, tokens
    cells: Sequence[Cell]
    is_patch: bool
    is_approximate: bool

    @classmethod
    def of(
        cls,
        body: Mapping[str, Any],
        vocabulary: Vocabulary,
        ids: Sequence[int],
        layers: Sequence[int],
        columns: Sequence[int],
        cells: Sequence[Cell],
        is_patch: bool,
    ) -> GridAnswer:
        """The answer to ``body``; ``columns`` are positions, where those are columns."""
        fields: Json = {
            "part": body["part"],
            "metric": body["metric"],
            "method": body["method"],
            "layers": list(layers),
        }
        if columns:
            fields["positions"] = list(columns)
            fields["tokens"] = [vocabulary.decoded(ids[column]) for column in columns]
        is_approximate = body["method"] == "gradient"
        return cls(fields=fields, cells=cells, is_patch=is_patch, is_approximate=is_approximate)

    def beside(self, more: Mapping[str, Any]) -> GridAnswer:
        """The same with more fields."""
        return replace(self, fields={**self.fields, **more})

    def json(self, grid: Grid, values: Array, vocabulary: Vocabulary) -> Json:
        """All of it. ``values`` (cells,) are NaN where they are not there yet."""
        notes = [APPROXIMATE] if self.is_approximate else []
        answer = {
            **self.fields,
            "answer": _named(grid.answer, vocabulary),
            "against": _named(grid.against, vocabulary),
        }
        if not self.is_patch:
            numbers = grid.plain - values
            answer["plain"] = arrays.digits(grid.plain)
        else:
            assert grid.donor is not None
            numbers, way = values - grid.plain, grid.donor - grid.plain
            if abs(way) > ALIKE:
                numbers = numbers / way
            else:
                notes.append(NO_WAY)
            answer |= {"clean": arrays.digits(grid.donor), "corrupt": arrays.digits(grid.plain)}
        answer["note"] = "; ".join(notes) or None
        return {**answer, "grid": arrays.significant(_rows(self.cells, numbers))}


def _named(token_id: int | None, vocabulary: Vocabulary) -> Json | None:
    if token_id is None:
        return None
    return {"token_id": token_id, "token": vocabulary.decoded(token_id)}


def _rows(cells: Sequence[Cell], values: Array) -> NDArray[numpy.float64]:
    """A row for each layer; those of layers with fewer heads end in NaN."""
    rows: dict[int, list[float]] = {}
    for cell, value in zip(cells, values.tolist(), strict=True):
        rows.setdefault(cell.layer, []).append(value)
    grid = numpy.full((len(rows), max(map(len, rows.values()))), numpy.nan)
    for number, row in enumerate(rows.values()):
        grid[number, : len(row)] = row
    return grid


def file(answer: Mapping[str, Any], form: Form) -> tuple[bytes, str]:
    """(an answer in another form than JSON, its content type)."""
    grid = numpy.array(answer["grid"], numpy.float64)
    if form == "npz":
        meta = {name: value for name, value in answer.items() if name != "grid"}
        return arrays.npz({"grid": grid.astype(numpy.float32)}, meta), "application/x-npz"
    rows, columns = _words(answer, grid)
    if form == "png":
        largest = numpy.nanmax(numpy.abs(grid), initial=0.0)
        shares = numpy.abs(grid) / largest if largest else grid
        size = picture.cell_size(*grid.shape)
        return picture.draw(shares, size, rows, columns), "image/png"
    return _page(answer, grid, rows, columns).encode(), "text/html; charset=utf-8"


def _words(answer: Mapping[str, Any], grid: NDArray[numpy.float64]) -> tuple[list[str], list[str]]:
    """The names of rows and columns."""
    width = grid.shape[1]
    heads = [f"head {head}" for head in range(width)] if width > 1 else [answer["part"]]
    return [f"layer {layer}" for layer in answer["layers"]], answer.get("tokens", heads)


def _page(
    answer: Mapping[str, Any],
    grid: NDArray[numpy.float64],
    rows: Sequence[str],
    columns: Sequence[str],
) -> str:
    """A page of its own: a table, red where the number is above 0 and blue where it is below."""
    largest = numpy.nanmax(numpy.abs(grid), initial=0.0) or 1.0
    head = "".join(f"<th>{html.escape(word)}</th>" for word in ("", *columns))
    lines = [f"<tr>{head}</tr>"]
    for word, numbers in zip(rows, grid.tolist(), strict=True):
        cells = "".join(map(_cell, numbers, [largest] * len(numbers)))
        lines.append(f"<tr><th>{html.escape(word)}</th>{cells}</tr>")
    token = answer["answer"]["token"]
    text = f"{answer['metric']} of {token!r}" + (f"; {answer['note']}" if answer["note"] else "")
    kind = "patched" if "corrupt" in answer else "ablated"
    return _PAGE.format(
        title=html.escape(f"{answer['part']}, {kind}"),
        text=html.escape(text),
        rows="\n".join(lines),
    )


def _cell(number: float, largest: float) -> str:
    if numpy.isnan(number):
        return "<td></td>"
    share = min(abs(number) / largest, 1.0)
    colour = f"rgba({'200, 40, 30' if number > 0 else '30, 80, 200'}, {share:.2f})"
    return f'<td style="background: {colour}">{arrays.digits(number):.3g}</td>'
