"""Grids of changes: activation patching and ablation, each cell a forward pass of its own.

A cell puts numbers of another text, or zeros, into one place of a layer and looks at what the last
position predicts. Meng and others 2022, arXiv:2202.05262 (causal tracing); Zhang and Nanda 2023,
arXiv:2309.16042, on metrics. Several cells are the rows of one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.places import LayerPlaces
from transformers_api.engine.runners.edited_modules import ModuleEdit, hooked
from transformers_api.errors import InvalidRequest, ModelNotCapable, PromptTooLarge
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.gradient_grid import Slope, slopes
from transformers_api.inspection.grid_question import Cell, Grid, GridQuestion
from transformers_api.inspection.places import EMBEDDING, Module, head_dims, module_of
from transformers_api.inspection.reading import Way, read

MOST_ROWS = 16  # of a pass
Row = tuple[Cell | None, int]  # a change, and the sample of noise that is read with it


def run_grid(
    model: Any,
    way: Way,
    donor_way: Way,
    anatomy: Anatomy,
    ids: list[int],
    question: GridQuestion,
) -> Generator[None, None, Grid]:
    """See ``base.Inspector.grid``; ``donor_way``: to read the donor."""
    grid = _Texts(model, way, anatomy, ids, question)
    donor = question.donor
    if donor is not None and len(donor) != len(ids):
        raise InvalidRequest(
            f"prompts have {len(donor)} and {len(ids)} tokens; they must have as many",
            param="corrupt",
        )
    donor_logits = None
    if donor is not None:
        donor_logits = yield from grid.read_donor(list(donor), donor_way)
    yield from grid.draw_noise()
    plain = None
    answer, against = question.answer or 0, question.against
    if not question.only_cells:
        plain = yield from grid.changed([(None, sample) for sample in grid.samples])
        answer, against = _tokens(plain.mean(0), donor_logits, question)
    metric = partial(_metric, question.metric, answer, against)
    began = time.monotonic()
    if question.method == "gradient":
        values = yield from grid.guessed(metric)
    else:
        values = yield from grid.filled(metric)
    return Grid(
        values=values.float().cpu().numpy(),
        plain=math.nan if plain is None else float(metric(plain).mean()),
        donor=None if donor_logits is None else float(metric(donor_logits[None])),
        answer=answer,
        against=against,
        seconds=time.monotonic() - began,
    )


class _Texts:
    """The text that is changed, in the model, and the numbers that are put into it."""

    def __init__(
        self, model: Any, way: Way, anatomy: Anatomy, ids: list[int], question: GridQuestion
    ) -> None:
        self.model = model
        self.way = way
        self.ids = ids
        self.question = question
        places = way.parts.places.of(model)
        self.sizes = head_dims(places, anatomy.attention)  # of heads, by layer
        self.modules = _modules(places, self.sizes, anatomy, question)
        self.embedding = module_of(places, EMBEDDING, "resid") if places else None
        self.donated: dict[int, Tensor] = {}  # layer: (T, width)
        self.noise: Tensor | None = None  # (samples, T, C)

    @property
    def samples(self) -> range:
        """The draws of the noise, or the one reading without any."""
        return range(1 if self.question.noise is None else self.question.noise.samples)

    def read_donor(self, donor: list[int], way: Way) -> Generator[None, None, Tensor]:
        """The logits (V,) after the donor, whose numbers are noted."""
        pieces: dict[int, list[Tensor]] = {layer: [] for layer in self.modules}
        notes = [
            ModuleEdit(module.name, module.side, partial(_take, pieces[layer]))
            for layer, module in self.modules.items()
        ]
        logits = yield from self._logits([donor], lambda *_: notes, way)
        self.donated = {layer: torch.cat(rows) for layer, rows in pieces.items()}
        return logits[0]

    def draw_noise(self) -> Generator[None, None, None]:
        """Draw the noise that the text is read with, where there is to be some."""
        noise = self.question.noise
        if noise is None:
            return
        assert self.embedding is not None
        rows: list[Tensor] = []
        note = ModuleEdit(self.embedding.name, self.embedding.side, partial(_take, rows))
        yield from self._logits([self.ids], lambda *_: [note], self.way)
        embeddings = torch.cat(rows).float()
        generator = torch.Generator().manual_seed(noise.seed)
        shape = (noise.samples, len(noise.positions), embeddings.shape[1])
        drawn = torch.randn(shape, generator=generator).to(embeddings.device)
        self.noise = torch.zeros(noise.samples, *embeddings.shape, device=embeddings.device)
        self.noise[:, list(noise.positions)] = drawn * noise.size * embeddings.std()

    def filled(self, metric: Callable[[Tensor], Tensor]) -> Generator[None, None, Tensor]:
        """The metric of each cell, by passes. Raises PromptTooLarge."""
        samples = len(self.samples)
        rows: list[Row] = [
            (cell, sample) for cell in self.question.cells for sample in self.samples
        ]
        width = 1
        if self.way.reads_in_chunks and self.way.edits is None:  # which are of one sequence
            width = min(max(self.way.slice_tokens // len(self.ids), 1), MOST_ROWS)
        values: list[Tensor] = []
        began = time.monotonic()
        for first in range(0, len(rows), width):
            some = rows[first : first + width]
            values.append(metric((yield from self.changed(some))))
            done = (first + len(some)) / samples
            _check_time(time.monotonic() - began, done, self.question)
        return torch.cat(values).view(-1, samples).mean(1)

    def guessed(self, metric: Callable[[Tensor], Tensor]) -> Generator[None, None, Tensor]:
        """The metric of each cell as far as it is linear in the change: (a' - a) . dF/da."""
        cells = self.question.cells
        values = torch.zeros(len(cells))
        for sample in self.samples:
            noise = None if self.noise is None else self.noise[sample]
            value, by_layer = slopes(
                self.model, self.way, self.ids, self.modules, metric, self.embedding, noise
            )
            yield
            values += torch.tensor([value + self._share(cell, by_layer) for cell in cells])
        return values / len(self.samples)

    def _share(self, cell: Cell, by_layer: dict[int, Slope]) -> float:
        slope = by_layer[cell.layer]
        own = self.donated[cell.layer].float() if self.donated else 0.0
        at, columns = self._place(cell, 0, len(self.ids))
        return float(((own - slope.rows) * slope.gradient)[at, columns].sum())

    def changed(self, rows: Sequence[Row]) -> Generator[None, None, Tensor]:
        """The logits (B, V) after the last token, with a change in each of these rows."""
        if self.way.edits is not None and len(rows) > 1:
            alone = []
            for row in rows:
                alone.append((yield from self.changed([row])))
            return torch.cat(alone)
        texts = [self.ids] * len(rows)
        return (yield from self._logits(texts, partial(self._edits, rows), self.way))

    def _logits(
        self, texts: list[list[int]], edits: Callable[[int, int], list[ModuleEdit]], way: Way
    ) -> Generator[None, None, Tensor]:
        tokens = torch.tensor(texts, device=self.model.device)
        logits = torch.empty(0)

        def arm(start: int, stop: int) -> AbstractContextManager[None]:
            return hooked(self.model, edits(start, stop))

        for chunk in read(self.model, tokens, way.width(len(texts)), way.armed(self.model, arm)):
            logits = chunk.logits[:, -1, : self.way.vocab_size].float()
            yield
        return logits

    def _edits(self, rows: Sequence[Row], start: int, stop: int) -> list[ModuleEdit]:
        """One edit of each layer's module, for those rows of the batch whose cell is in it."""
        by_layer: dict[int, list[tuple[int, Cell]]] = {}
        for row, (cell, _) in enumerate(rows):
            if cell is not None and (cell.position is None or start <= cell.position < stop):
                by_layer.setdefault(cell.layer, []).append((row, cell))

        def apply(layer: int, tensor: Tensor) -> None:
            batch = tensor.view(len(rows), stop - start, -1)
            for row, cell in by_layer[layer]:
                at, columns = self._place(cell, start, stop)
                source = slice(at.start + start, at.stop + start)
                own = batch[row, at, columns]
                if self.donated:
                    own.copy_(self.donated[layer][source, columns])
                else:
                    own.zero_()

        edits = [
            ModuleEdit(self.modules[layer].name, self.modules[layer].side, partial(apply, layer))
            for layer in by_layer
        ]
        if self.noise is not None and self.embedding is not None:
            drawn = self.noise[[sample for _, sample in rows], start:stop].flatten(0, 1)

            def disturb(tensor: Tensor) -> None:
                tensor.copy_(tensor.float() + drawn)

            edits.append(ModuleEdit(self.embedding.name, self.embedding.side, disturb))
        return edits

    def _place(self, cell: Cell, start: int, stop: int) -> tuple[slice, slice]:
        """(the positions of a cell among [start, stop), counted from ``start``; its columns)."""
        at, columns = slice(0, stop - start), slice(None)
        if cell.position is not None:
            at = slice(cell.position - start, cell.position - start + 1)
        if cell.head is not None:
            size = self.sizes[cell.layer]
            columns = slice(cell.head * size, (cell.head + 1) * size)
        return at, columns


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


def _take(pieces: list[Tensor], rows: Tensor) -> None:
    pieces.append(rows.clone())


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


def _check_time(seconds: float, done: float, question: GridQuestion) -> None:
    """Raise PromptTooLarge where the rest would take too long."""
    count = len(question.cells)
    if (whole := seconds / done * count) > question.within_s and done < count:
        fits = max(int(question.within_s / seconds * done), 1)
        raise PromptTooLarge(
            f"A grid of {count} cells takes about {whole:.0f} s here (max {question.within_s:g} "
            f"s); ask for fewer layers, positions or heads (up to {fits} cells), method "
            '"gradient", or "job": true'
        )
