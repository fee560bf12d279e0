"""Interventions on sequences that asked, in the pass that reads them, beside everybody else's.

``InterveningRunner`` wraps the engine's runner: it works out which rows of a pass are edited, and
has the backend stop where their parts are in memory. ``InterveningSampler`` ends a sequence whose
edits led to numbers that are not finite. Without an edited sequence neither does anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.linalg import vector_norm

from transformers_api.engine.backend import Backend
from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.edited_attention import Attending, AttentionEdit, edited_model
from transformers_api.engine.runners.edited_modules import ModuleEdit
from transformers_api.engine.runners.model_runner import Runner, innermost
from transformers_api.engine.sampling.sampler import TokenSampler
from transformers_api.engine.scheduler import SlotStore
from transformers_api.engine.sequence import SampledToken, Sequence
from transformers_api.inspection.attention import AttentionSource
from transformers_api.inspection.attention_edits import change_attention
from transformers_api.inspection.base import LayerAttention
from transformers_api.inspection.edit_plan import Edit, EditPlan, InterventionFailed
from transformers_api.inspection.parts import Parts
from transformers_api.inspection.places import Module, head_dims, module_of

LARGEST = 1e15  # of a change's length: its square is still a number in float32


@dataclass(slots=True)
class _Rows:
    """Rows of a pass that belong to one sequence: its tokens from position ``first`` on."""

    start: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class PreparedEdit:
    """An edit with its module and its tensors."""

    edit: Edit
    module: Module
    head_dim: int
    vector: Tensor | None  # as the module's own numbers: divided by the writer's factor

    def apply(self, rows: Tensor, offset: int) -> bool:
        """Change ``rows`` (n, width), of which the first is the ``offset``-th position edited.

        False where the result is no number or too large; the rows are as they were then.
        """
        # A step of a small model takes milliseconds, and a call of torch in it 50 microseconds.
        part = self._part(rows)
        if self.edit.do == "add" and not self.edit.keeps_norm:
            assert self.vector is not None
            changed = part + self.vector  # in float32, which the vector is
        else:
            part = part.float()
            changed = self._changed(part, offset)
        if self.edit.keeps_norm:
            length = vector_norm(changed, dim=-1, keepdim=True).clamp_min(1e-30)
            changed = changed * (vector_norm(part, dim=-1, keepdim=True) / length)
        if not float(vector_norm(changed)) <= LARGEST:  # nor where it is no number
            return False
        self._write(rows, changed)
        return True

    def _part(self, rows: Tensor) -> Tensor:
        """(n, C), (n, heads, D) or (n, neurons)."""
        edit = self.edit
        if edit.part == "head":
            return rows.view(len(rows), -1, self.head_dim)[:, list(edit.units)]
        return rows[:, list(edit.units)] if edit.part == "neuron" else rows

    def _write(self, rows: Tensor, changed: Tensor) -> None:
        edit = self.edit
        if edit.part == "head":
            heads = rows.view(len(rows), -1, self.head_dim)
            heads[:, list(edit.units)] = changed.to(rows.dtype)
        elif edit.part == "neuron":
            rows[:, list(edit.units)] = changed.to(rows.dtype)
        else:
            rows.copy_(changed)

    def _changed(self, part: Tensor, offset: int) -> Tensor:
        edit = self.edit
        if edit.feature is not None:
            rows = (part * self.module.factor).cpu().numpy()
            changed = torch.from_numpy(edit.feature.applied(rows)).to(part.device)
            return changed / self.module.factor
        if edit.do == "scale":
            return part * edit.by if edit.by else torch.zeros_like(part)
        assert self.vector is not None
        vector = self.vector
        if edit.do == "add":
            return part + vector
        if edit.do == "erase":
            return part - (part @ vector.T) @ vector
        if edit.is_aligned:
            vector = vector[offset : offset + len(part)]
        return vector.expand_as(part)


def prepared(
    plan: EditPlan, model: Any, parts: Parts, attention: SequenceOf[LayerAttention]
) -> list[PreparedEdit]:
    """The edits of a plan for a model."""
    places = parts.places.of(model)
    heads = head_dims(places, attention)
    edits = []
    for edit in plan.edits:
        if edit.part == "weights":
            continue
        module = module_of(places, edit.layer, edit.part)
        assert module is not None
        vector = None
        if edit.vector is not None:
            vector = torch.from_numpy(edit.vector).to(model.device)
        if vector is not None and edit.do != "erase":
            vector = vector / module.factor
        edits.append(PreparedEdit(edit, module, heads.get(edit.layer, 0), vector))
    return edits


class Edited(Protocol):
    """Whose tokens are edited."""

    @property
    def edits(self) -> object:
        """An EditPlan."""
        ...


_Change = tuple[PreparedEdit, _Rows, Edited]


@dataclass(slots=True)
class PassEdits:
    """The edits of a pass, by module and side, in the order in which they were asked for."""

    total: int  # rows that the batch reads
    is_single: bool  # of one sequence
    source: AttentionSource
    by_module: dict[tuple[str, str], list[_Change]] = field(default_factory=dict)
    attention: list[AttentionEdit] = field(default_factory=list)
    failures: dict[Edited, Edit] = field(default_factory=dict)

    def add(
        self,
        seq: Edited,
        edits: SequenceOf[PreparedEdit],
        rows: _Rows,
        context: int,
        slot: int = 0,
    ) -> None:
        """The edits that change one of these rows of a sequence, which is in this slot.

        ``context``: its tokens in the cache after the pass.
        """
        for each in edits:
            if _concerns(each.edit, rows):
                key = each.module.name, each.module.side
                self.by_module.setdefault(key, []).append((each, rows, seq))
        for layer, of_layer in _plan_of(seq).attention.items():
            if any(_concerns(edit, rows) for edit in of_layer):
                apply = partial(self._attend, of_layer, seq, rows.first + rows.count)
                own = rows.start, rows.count, self.total, context, slot
                place = self.source.place_of(layer)
                self.attention.append(AttentionEdit(layer, *own, apply, place))

    def module_edits(self) -> list[ModuleEdit]:
        """One for each module and side."""
        return [
            ModuleEdit(name, "in" if side == "in" else "out", partial(self._apply, changes))
            for (name, side), changes in self.by_module.items()
        ]

    def _attend(self, edits: SequenceOf[Edit], seq: Edited, stop: int, call: Attending) -> None:
        began = time.perf_counter()
        tally = _plan_of(seq).tally
        _, count, keys = call.shape
        tally.tokens += change_attention(edits, call, stop - count, stop - keys)
        tally.seconds += time.perf_counter() - began

    def _apply(self, changes: SequenceOf[_Change], tensor: Tensor) -> None:
        # A model that keeps no state reads a sequence again from its start: more rows than new.
        before = len(tensor) - self.total if self.is_single else 0
        for each, rows, seq in changes:
            began = time.perf_counter()
            first = rows.first - before
            own = tensor[rows.start : rows.start + rows.count + before]
            tokens = 0 if seq in self.failures else _edited(each, own, first)
            if tokens is None:
                self.failures[seq] = each.edit
            tally = _plan_of(seq).tally
            tally.tokens += tokens or 0
            tally.seconds += time.perf_counter() - began


def _plan_of(seq: Edited) -> EditPlan:
    return cast(EditPlan, seq.edits)


def _edited(each: PreparedEdit, own: Tensor, first: int) -> int | None:
    """The tokens that were changed of ``own``, from position ``first`` on; None: it failed."""
    tokens = before = 0
    for span in each.edit.positions:
        if here := _within(span, first, len(own)):
            start, stop = here
            if not each.apply(own[start - first : stop - first], before + start - span[0]):
                return None
            tokens += stop - start
        before += (span[1] or span[0]) - span[0]
    return tokens


def _concerns(edit: Edit, rows: _Rows) -> bool:
    return any(_within(span, rows.first, rows.count) for span in edit.positions)


def _within(span: tuple[int, int | None], first: int, count: int) -> tuple[int, int] | None:
    """The positions of ``span`` that are among ``count`` ones from ``first`` on."""
    start, stop = max(span[0], first), first + count
    stop = stop if span[1] is None else min(span[1], stop)
    return (start, stop) if start < stop else None


class EditedText:
    """The edits of a text that an inspection reads. Meets ``reading.TextEdits`` and Edited."""

    def __init__(
        self,
        plan: EditPlan,
        parts: Parts,
        attention: SequenceOf[LayerAttention],
        source: AttentionSource,
    ) -> None:
        self.edits = plan
        self._places = parts, attention
        self._source = source
        self._prepared: list[PreparedEdit] = []

    @contextmanager
    def editing(self, model: Any, start: int, stop: int) -> Iterator[None]:
        """See TextEdits. Raises InterventionFailed."""
        self._prepared = self._prepared or prepared(self.edits, model, *self._places)
        changes = PassEdits(stop - start, True, self._source)
        changes.add(self, self._prepared, _Rows(0, start, stop - start), stop)
        with edited_model(model, changes.module_edits(), changes.attention):
            yield
        for edit in changes.failures.values():
            raise InterventionFailed(
                f"the edited stream of layer {edit.layer} became infinite; use a smaller scale",
                param="intervene",
            )


def _reason(seq: Sequence, where: str = "") -> str:
    return f"the edited stream{where} became infinite at step {seq.num_output}; use a smaller scale"


class InterveningRunner:
    """Wraps a runner; see the module."""

    def __init__(
        self,
        inner: Runner,
        model: Any,
        backend: Backend,
        parts: Parts,
        attention: SequenceOf[LayerAttention],
        source: AttentionSource,
    ) -> None:
        self.inner = inner
        self.source = source
        self.model = model
        self.backend = backend
        self._places = parts, attention
        self.failures: WeakKeyDictionary[Sequence, str] = WeakKeyDictionary()
        self._prepared: WeakKeyDictionary[EditPlan, list[PreparedEdit]] = WeakKeyDictionary()
        self._reads_all = bool(getattr(innermost(inner), "recompute", False))

    @property
    def cache(self) -> SlotStore:
        """The inner runner's."""
        return self.inner.cache

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        if not batch.is_edited:
            return self.inner.forward(batch, keep)
        changes = PassEdits(batch.tokens, len(batch.sequences) == 1, self.source)
        start = 0
        for seq, width in zip(batch.sequences, batch.widths, strict=True):
            if seq.edits is not None and seq not in self.failures:
                first = seq.start + (0 if self._reads_all else seq.num_cached)
                rows = _Rows(start, first, seq.start + seq.num_cached + width - first)
                context = seq.num_cached + width
                changes.add(seq, self._edits_of(_plan_of(seq)), rows, context, seq.slot)
                if self._reads_all:
                    rows.first, rows.count = seq.start + seq.num_cached, width
            start += width
        edits, attention = changes.module_edits(), changes.attention
        is_edited = edits or attention
        with self.backend.editing(self.model, edits, attention) if is_edited else nullcontext():
            logits = self.inner.forward(batch, keep)
        for seq in batch.sequences:
            if (edit := changes.failures.get(seq)) is not None:
                self.failures[seq] = _reason(seq, f" of layer {edit.layer}")
        return logits

    def clear(self) -> None:
        """See Runner."""
        self.inner.clear()

    def _edits_of(self, plan: EditPlan) -> list[PreparedEdit]:
        if plan not in self._prepared:
            self._prepared[plan] = prepared(plan, self.model, *self._places)
        return self._prepared[plan]


class InterveningSampler:
    """Wraps a sampler; see the module."""

    def __init__(self, inner: TokenSampler, runner: InterveningRunner) -> None:
        self.inner = inner
        self.runner = runner

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """See TokenSampler."""
        sampled = self.inner.sample(logits, sequences)
        for row, seq in enumerate(sequences):
            if seq.edits is None:
                continue
            reason = self.runner.failures.get(seq)
            if reason is None and sampled[row].error is not None and logits[row].isnan().any():
                reason = _reason(seq)
            if reason is not None:
                sampled[row] = SampledToken(0, error=InterventionFailed(reason, param="intervene"))
        return sampled
