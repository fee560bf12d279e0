"""Grids of changes: activation patching and ablation, each cell a forward pass of its own.

A cell puts numbers of another text, or zeros, into one place of a layer and looks at what the last
position predicts. Meng and others 2022, arXiv:2202.05262 (causal tracing); Zhang and Nanda 2023,
arXiv:2309.16042, on metrics. Several cells are the rows of one batch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.places import LayerPlaces
from transformers_api.engine.runners.edited_modules import ModuleEdit, hooked
from transformers_api.errors import InvalidRequest, ModelNotCapable, PromptTooLarge
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.grid_question import Cell, Grid, GridQuestion
from transformers_api.inspection.places import Module, head_dims, module_of
from transformers_api.inspection.reading import Way, read, unarmed

MOST_ROWS = 16  # of a pass


def run_grid(
    model: Any, way: Way, anatomy: Anatomy, ids: list[int], question: GridQuestion
) -> Generator[None, None, Grid]:
    """See ``base.Inspector.grid``."""
    places = way.parts.places.of(model)
    sizes = head_dims(places, anatomy.attention)
    modules = _modules(places, sizes, anatomy, question)
    plain = yield from _logits(model, way, ids)
    donated: dict[int, Tensor] = {}
    donor_logits = None
    if question.donor is not None:
        if len(question.donor) != len(ids):
            raise InvalidRequest(
                f"prompts have {len(question.donor)} and {len(ids)} tokens; they must have as many",
                param="corrupt",
            )
        donated = {layer: torch.empty(0) for layer in modules}
        donor_logits = yield from _logits(model, way, list(question.donor), modules, donated)
    answer, against = _tokens(plain, donor_logits, question)
    metric = partial(_metric, question.metric, answer, against)
    rows = min(max(way.slice_tokens // len(ids), 1), MOST_ROWS) if way.reads_in_chunks else 1
    values: list[Tensor] = []
    began = time.monotonic()
    for first in range(0, len(question.cells), rows):
        cells = question.cells[first : first + rows]
        edits = partial(_edits, cells, modules, donated, sizes)
        logits = yield from _changed_logits(model, way, ids, len(cells), edits)
        values.append(metric(logits))
        _check_time(time.monotonic() - began, first + len(cells), question)
    return Grid(
        values=torch.cat(values).float().cpu().numpy(),
        plain=float(metric(plain[None])),
        donor=None if donor_logits is None else float(metric(donor_logits[None])),
        answer=answer,
        against=against,
    )


def _modules(
    places: Sequence[LayerPlaces], sizes: dict[int, int], anatomy: Anatomy, question: GridQuestion
) -> dict[int, Module]:
    """The module of the part in each layer. Raises ModelNotCapable."""
    modules: dict[int, Module] = {}
    for layer in {cell.layer for cell in question.cells}:
        module = module_of(places, layer, question.part) if places else None
        if module is None or (question.part == "head" and not sizes.get(layer)):
            raise ModelNotCapable(
                f"layer {layer} of model type {anatomy.model_type} has no {question.part} that can "
                "be changed",
                param="part",
            )
        modules[layer] = module
    return modules


def _logits(
    model: Any,
    way: Way,
    ids: list[int],
    modules: dict[int, Module] | None = None,
    taken: dict[int, Tensor] | None = None,
) -> Generator[None, None, Tensor]:
    """The logits (V,) after the last token; ``taken`` gets the rows (T, width) of ``modules``."""
    pieces: dict[int, list[Tensor]] = {layer: [] for layer in modules or {}}

    def arm(_start: int, _stop: int) -> AbstractContextManager[Any]:
        if not modules:
            return unarmed(_start, _stop)
        notes = [
            ModuleEdit(module.name, module.side, partial(_take, pieces[layer]))
            for layer, module in modules.items()
        ]
        return hooked(model, notes)

    logits = torch.empty(0)
    for chunk in read(model, torch.tensor([ids], device=model.device), way.width(), arm):
        logits = chunk.logits[0, -1, : way.vocab_size].float()
        yield
    if taken is not None:
        taken.update({layer: torch.cat(rows) for layer, rows in pieces.items()})
    return logits


def _take(pieces: list[Tensor], rows: Tensor) -> None:
    pieces.append(rows.clone())


def _changed_logits(
    model: Any, way: Way, ids: list[int], count: int, edits: Any
) -> Generator[None, None, Tensor]:
    """The logits (B, V) after the last token, with a change in each of ``count`` rows."""
    tokens = torch.tensor([ids] * count, device=model.device)
    logits = torch.empty(0)

    def arm(start: int, stop: int) -> AbstractContextManager[None]:
        return hooked(model, edits(start, stop))

    for chunk in read(model, tokens, way.width(count), arm):
        logits = chunk.logits[:, -1, : way.vocab_size].float()
        yield
    return logits


def _edits(
    cells: Sequence[Cell],
    modules: dict[int, Module],
    donated: dict[int, Tensor],
    sizes: dict[int, int],
    start: int,
    stop: int,
) -> list[ModuleEdit]:
    """One edit of each layer's module, for those rows of the batch whose cell is in it."""
    by_layer: dict[int, list[tuple[int, Cell]]] = {}
    for row, cell in enumerate(cells):
        if cell.position is None or start <= cell.position < stop:
            by_layer.setdefault(cell.layer, []).append((row, cell))

    def apply(layer: int, rows: Tensor) -> None:
        batch = rows.view(len(cells), stop - start, -1)
        for row, cell in by_layer[layer]:
            at, source = slice(None), slice(start, stop)
            if cell.position is not None:
                at = slice(cell.position - start, cell.position - start + 1)
                source = slice(cell.position, cell.position + 1)
            columns = slice(None)
            if cell.head is not None:
                columns = slice(cell.head * sizes[layer], (cell.head + 1) * sizes[layer])
            own = batch[row, at, columns]
            own.copy_(donated[layer][source, columns]) if donated else own.zero_()

    return [
        ModuleEdit(modules[layer].name, modules[layer].side, partial(apply, layer))
        for layer in by_layer
    ]


def _tokens(plain: Tensor, donor: Tensor | None, question: GridQuestion) -> tuple[int, int | None]:
    """(the answer, the token that it is compared with)."""
    own = int(plain.argmax())
    answer = question.answer
    if answer is None:
        answer = own if donor is None else int(donor.argmax())
    against = question.against
    if against is None and question.metric == "logit_difference" and own != answer:
        against = own
    return answer, against if question.metric == "logit_difference" else None


def _metric(name: str, answer: int, against: int | None, logits: Tensor) -> Tensor:
    """(B,) of logits (B, V)."""
    if name == "logit_difference":
        own = logits[:, answer]
        return own if against is None else own - logits[:, against]
    scores = logits.log_softmax(-1)[:, answer]
    return scores.exp() if name == "prob" else scores


def _check_time(seconds: float, done: int, question: GridQuestion) -> None:
    """Raise PromptTooLarge where the rest would take too long."""
    count = len(question.cells)
    if (whole := seconds / done * count) > question.within_s and done < count:
        fits = max(int(question.within_s / seconds * done), 1)
        raise PromptTooLarge(
            f"A grid of {count} cells takes about {whole:.0f} s here (max {question.within_s:g} "
            f"s); ask for fewer layers, positions or heads (up to {fits} cells)"
        )
