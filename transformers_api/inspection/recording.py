"""Rows of parts of layers, noted by the very passes that read a sequence; on the engine thread.

A note is taken where an edit would write: after whatever is edited there, from the numbers that go
on through the model, in their own bits.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.edited_attention import AttentionEdit, AttentionInputs
from transformers_api.engine.runners.edited_modules import ModuleEdit
from transformers_api.engine.sequence import Sequence
from transformers_api.inspection.activations import (
    READ_BY_ATTENTION,
    Activation,
    ActivationPart,
    ActivationSpec,
    RecordedRows,
)
from transformers_api.inspection.attention import Attended, Weights
from transformers_api.inspection.base import LayerAttention, TracePlan
from transformers_api.inspection.parts import Parts
from transformers_api.inspection.pass_edits import plan_of
from transformers_api.inspection.places import Module, head_dims, module_of
from transformers_api.inspection.token_rows import TokenRows


@dataclass(slots=True)
class Taken:
    """The notes of a sequence since its last token."""

    records: list[RecordedRows] = field(default_factory=list)
    activations: dict[ActivationSpec, Activation] = field(default_factory=dict)
    token: TokenRows = field(default_factory=TokenRows)  # of the token that was read last


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a pass: those of one sequence, from position ``first`` on."""

    start: int
    count: int
    first: int


class Recorder:
    """Notes of the sequences of passes; those of each are taken when its next token is known."""

    def __init__(self, model: Any, parts: Parts, attention: SequenceOf[LayerAttention]) -> None:
        self.model = model
        self._parts, self._attention = parts, attention
        self._taken: WeakKeyDictionary[Sequence, Taken] = WeakKeyDictionary()

    def take(self, seq: Sequence) -> Taken:
        """Return the notes of ``seq`` since its last token, once."""
        return self._taken.pop(seq, None) or Taken()

    def edits(self, batch: Batch, name: str) -> list[ModuleEdit]:
        """Edits that change nothing and note what the plans ``name`` of the sequences want."""
        takers: dict[tuple[str, Any], list[Any]] = {}
        total = batch.tokens if len(batch.sequences) == 1 else None
        start = 0
        for seq, width, ends in zip(batch.sequences, batch.widths, batch.ends, strict=True):
            plan: TracePlan | None = seq.observe.get(name)
            if plan is not None and (plan.records or plan.activations or plan.parts):
                rows = _Rows(start, width, seq.start + seq.num_cached)
                self._add(takers, seq, plan, rows, ends)
            start += width
        return [
            ModuleEdit(module, side, partial(_each, notes, total))
            for (module, side), notes in takers.items()
        ]

    def attention_edits(self, batch: Batch, name: str) -> list[AttentionEdit]:
        """The same of queries, keys and values, before attention reads them."""
        edits: list[AttentionEdit] = []
        start = 0
        for seq, width in zip(batch.sequences, batch.widths, strict=True):
            plan: TracePlan | None = seq.observe.get(name)
            by_layer: dict[int, list[ActivationPart]] = {}
            for layer, part in () if plan is None else plan.records:
                if part in READ_BY_ATTENTION:
                    by_layer.setdefault(layer, []).append(part)
            context = seq.num_cached + width
            for layer, parts in by_layer.items():
                note = partial(_record_inputs, self._of(seq), layer, parts, seq.start + context)
                where = start, width, batch.tokens, context, seq.slot
                edits.append(AttentionEdit(layer, *where, before=note, writes=False))
            start += width
        return edits

    def note_attention(
        self, seq: Sequence, spec: ActivationSpec, weights: Weights, at: Any
    ) -> None:
        """Note a query, a key or a value; ``at``: its sequence in the pass, its place in the text.

        The text is what the model sees of it.
        """
        if not isinstance(weights, Attended):
            return
        place, context = at
        if spec.part == "q":
            numbers = weights.query[place, :, -1]
        else:
            states = weights.key if spec.part == "k" else weights.value
            last = min(states.shape[2], context) - 1
            numbers = weights.numbers(states[place][:, last : last + 1])[:, 0]
        chosen = numbers[list(spec.units)] if spec.units else numbers
        self._of(seq).activations[spec] = _activation(spec, chosen)

    def _of(self, seq: Sequence) -> Taken:
        return self._taken.setdefault(seq, Taken())

    def _add(
        self,
        takers: dict[tuple[str, Any], list[Any]],
        seq: Sequence,
        plan: TracePlan,
        rows: _Rows,
        ends: bool,
    ) -> None:
        taken = self._of(seq)
        for layer, part in plan.records:
            if part in READ_BY_ATTENTION:
                continue
            module = self._module(layer, part)
            note = partial(_record, taken, layer, part, module.factor, rows)
            takers.setdefault((module.name, module.side), []).append((rows, note))
        if not ends:
            return
        if plan.parts is not None:
            for key in self._summed(plan.parts.by == "head", seq):
                takers.setdefault(key, []).append((rows, partial(_keep, taken.token, *key)))
        for spec in plan.activations:
            if spec.part in READ_BY_ATTENTION:
                continue
            module = self._module(spec.layer, spec.part)
            size = self._head_dim(spec.layer) if spec.part == "head" else 0
            note = partial(_note, taken, spec, module.factor, size)
            takers.setdefault((module.name, module.side), []).append((rows, note))

    def _summed(self, by_head: bool, seq: Sequence) -> list[tuple[str, Any]]:
        """Modules and sides: the stream before and behind all layers, and what is added to it.

        Heads and neurons, too, where the sequence's are edited.
        """
        places = self._parts.places.of(self.model)
        edited = set() if seq.edits is None else plan_of(seq).parts
        keys: list[tuple[str, Any]] = [(places[0].layer, "in"), (places[-1].layer, "out")]
        for layer, place in enumerate(places):
            keys += [(writer.name, "out") for writer in place.writers]
            if place.reader is not None and (by_head or (layer, "head") in edited):
                keys.append((place.reader, "in"))
            if place.down is not None and (layer, "neuron") in edited:
                keys.append((place.down, "in"))
        return keys

    def _module(self, layer: int, part: ActivationPart) -> Module:
        module = module_of(self._parts.places.of(self.model), layer, part)
        assert module is not None
        return module

    def _head_dim(self, layer: int) -> int:
        return head_dims(self._parts.places.of(self.model), self._attention)[layer]


def _each(takers: SequenceOf[Any], total: int | None, tensor: Tensor) -> None:
    # A model that keeps no state reads a sequence again from its start: more rows than new.
    before = 0 if total is None else len(tensor) - total
    for rows, note in takers:
        first = before + rows.start
        note(tensor[first : first + rows.count])


def _record(
    taken: Taken, layer: int, part: ActivationPart, factor: float, rows: _Rows, own: Tensor
) -> None:
    taken.records.append(
        RecordedRows(
            part=part,
            layer=layer,
            start=rows.first,
            bits=bits(own),
            dtype=str(own.dtype).removeprefix("torch."),
            factor=factor,
        )
    )


def _record_inputs(
    taken: Taken, layer: int, parts: SequenceOf[ActivationPart], stop: int, inputs: AttentionInputs
) -> None:
    """Note rows of ``parts``, whose last is that of the token before ``stop``."""
    for part in parts:
        own = inputs.of(part)
        rows = _Rows(0, len(own), stop - len(own))
        _record(taken, layer, part, 1.0, rows, own.flatten(1))


def _keep(rows: TokenRows, module: str, side: str, own: Tensor) -> None:
    side_rows = rows.inputs if side == "in" else rows.outputs
    side_rows[module] = own[-1].clone()


def bits(rows: Tensor) -> numpy.ndarray[Any, Any]:
    """A copy of ``rows``: uint16 of two bytes each, or float32."""
    if rows.dtype in (torch.bfloat16, torch.float16):
        own = rows.detach().clone(memory_format=torch.contiguous_format)
        return own.cpu().view(torch.int16).numpy().view(numpy.uint16)
    return rows.detach().float().clone(memory_format=torch.contiguous_format).cpu().numpy()


def _note(taken: Taken, spec: ActivationSpec, factor: float, head_dim: int, own: Tensor) -> None:
    row = own[-1].float() * factor
    if spec.part == "head":
        heads = row.view(-1, head_dim)
        numbers = heads[list(spec.units)] if spec.units else heads
    else:
        numbers = (row[list(spec.units)] if spec.units else row)[None]
    taken.activations[spec] = _activation(spec, numbers)


def _activation(spec: ActivationSpec, numbers: Tensor) -> Activation:
    """``numbers`` (H', D)."""
    values, places = numbers.float(), None
    if spec.topk:
        best = values.abs().topk(min(spec.topk, values.shape[1]), dim=-1).indices
        values, places = values.gather(1, best), best.cpu().numpy()
        if spec.part == "neuron" and spec.units:
            places = numpy.array(spec.units)[places]
    return Activation(
        part=spec.part,
        layer=spec.layer,
        values=values.clone().cpu().numpy(),
        places=places,
    )
