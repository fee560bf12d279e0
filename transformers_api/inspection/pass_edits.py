"""The edits of one pass: the rows of it that they change, and what became of them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

from torch import Tensor

from transformers_api.engine.runners.edited_attention import (
    Attending,
    AttentionEdit,
    AttentionInputs,
)
from transformers_api.engine.runners.edited_modules import ModuleEdit, RowsChange
from transformers_api.inspection.attention import AttentionSource
from transformers_api.inspection.attention_edits import change_attention
from transformers_api.inspection.edit_plan import Edit, EditPlan
from transformers_api.inspection.prepared_edits import ATTENTION, PreparedEdit
from transformers_api.inspection.token_rows import Moved

_TwoNumbers = ctypes.c_int64 * 2


@dataclass(slots=True)
class Rows:
    """Rows of a pass that belong to one sequence: its tokens from position ``first`` on."""

    start: int
    first: int
    count: int


class Edited(Protocol):
    """Whose tokens are edited."""

    @property
    def edits(self) -> object:
        """An EditPlan."""
        ...


@dataclass(slots=True)
class _State:
    """The state of the edits of a sequence in a pass: (the first that failed, nanoseconds).

    The former is its number, from 1 on; 0: none did. A backend that edits by itself writes here.
    """

    seq: Edited
    numbers: ctypes.Array[ctypes.c_int64]
    address: int

    @classmethod
    def of(cls, seq: Edited) -> _State:
        """Nothing yet."""
        numbers = _TwoNumbers()
        return cls(seq, numbers, ctypes.addressof(numbers))


@dataclass(slots=True)
class _Change:
    """An edit of some rows of a pass."""

    each: PreparedEdit
    rows: Rows
    state: _State
    number: int
    moved: Moved | None = None  # where it is noted what is added to the sequence's last row
    is_applied: bool = False  # here, not by the backend itself

    def spans(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Those of ``count`` positions from ``first`` on that it edits.

        Start, stop, and how many it edits before them.
        """
        before = 0
        for span in self.each.edit.positions:
            if here := _within(span, first, count):
                yield *here, before + here[0] - span[0]
            before += (span[1] or span[0]) - span[0]

    def row_changes(self) -> list[RowsChange] | None:
        """The same for a backend that edits by itself; None: it cannot be said."""
        if self.each.pieces is None or self.moved is not None:
            return None
        rows, made = self.rows, []
        for start, stop, offset in self.spans(rows.first, rows.count):
            row = rows.start + start - rows.first
            made += self.each.changes(row, stop - start, offset, self.number, self.state.address)
        return made

    def note(self, own: Tensor, first: int) -> None:
        """Change rows as ``apply`` does; add to what edits have ``moved`` the last of them by."""
        if self.moved is None:
            return self.apply(own, first)
        before = own[-1].detach().clone().float()
        self.apply(own, first)
        by = own[-1].detach().float() - before
        if bool(by.any()):
            key = self.each.module.name, self.each.module.side
            self.moved[key] = self.moved.get(key, 0) + by
        return None

    def apply(self, own: Tensor, first: int) -> None:
        """Change rows of the sequence, from position ``first`` on."""
        began = time.perf_counter_ns()
        self.is_applied = True
        tally = plan_of(self.state.seq).tally
        for start, stop, offset in self.spans(first, len(own)):
            if self.state.numbers[0]:
                break
            if not self.each.apply(own[start - first : stop - first], offset):
                self.state.numbers[0] = self.number
                break
            tally.tokens += stop - start
        self.state.numbers[1] += time.perf_counter_ns() - began


@dataclass(slots=True)
class PassEdits:
    """The edits of a pass, by module and side, in the order in which they were asked for."""

    total: int  # rows that the batch reads
    is_single: bool  # of one sequence
    source: AttentionSource
    attention: list[AttentionEdit] = field(default_factory=list)
    by_module: dict[tuple[str, str], list[_Change]] = field(default_factory=dict)
    _changes: list[_Change] = field(default_factory=list)
    _states: list[_State] = field(default_factory=list)

    def add(
        self,
        seq: Edited,
        edits: SequenceOf[PreparedEdit],
        rows: Rows,
        context: int,
        slot: int = 0,
        moved: Moved | None = None,
    ) -> None:
        """The edits that change one of these rows of a sequence, which is in this slot.

        ``context``: its tokens in the cache after the pass. ``moved``: gets what is added to the
        last row of each module.
        """
        state = _State.of(seq)
        self._states.append(state)
        inputs: dict[int, list[_Change]] = {}
        for each in edits:
            if _concerns(each.edit, rows):
                change = _Change(each, rows, state, len(self._changes) + 1, moved)
                self._changes.append(change)
                if each.module is ATTENTION:
                    inputs.setdefault(each.edit.layer, []).append(change)
                    continue
                key = each.module.name, each.module.side
                self.by_module.setdefault(key, []).append(change)
        weights = {
            layer: own
            for layer, own in plan_of(seq).attention.items()
            if any(_concerns(edit, rows) for edit in own)
        }
        stop = rows.first + rows.count
        place = rows.start, rows.count, self.total, context, slot
        for layer in {**inputs, **weights}:
            own = weights.get(layer)
            apply = partial(_attend, own, state, stop) if own else None
            before = partial(_change_inputs, inputs[layer]) if layer in inputs else None
            where = self.source.place_of(layer)
            self.attention.append(AttentionEdit(layer, *place, apply, where, before))

    def module_edits(self) -> list[ModuleEdit]:
        """One for each module and side."""
        return [
            ModuleEdit(
                name,
                "in" if side == "in" else "out",
                partial(self._apply, changes),
                _joined([change.row_changes() for change in changes]),
            )
            for (name, side), changes in self.by_module.items()
        ]

    def finish(self) -> dict[Edited, Edit]:
        """Count what was done; the first edit that failed of each sequence of which one did."""
        failures: dict[Edited, Edit] = {}
        for state in self._states:
            failed, nanoseconds = state.numbers
            plan_of(state.seq).tally.seconds += nanoseconds / 1e9
            if failed:
                failures[state.seq] = self._changes[failed - 1].each.edit
        for change in self._changes:
            if not change.is_applied and change.state.seq not in failures:
                spans = change.spans(change.rows.first, change.rows.count)
                tokens = sum(stop - start for start, stop, _ in spans)
                plan_of(change.state.seq).tally.tokens += tokens
        return failures

    def _apply(self, changes: SequenceOf[_Change], tensor: Tensor) -> None:
        # A model that keeps no state reads a sequence again from its start: more rows than new.
        before = len(tensor) - self.total if self.is_single else 0
        for change in changes:
            rows = change.rows
            own = tensor[rows.start : rows.start + rows.count + before]
            change.note(own, rows.first - before)


def _change_inputs(changes: SequenceOf[_Change], inputs: AttentionInputs) -> None:
    for change in changes:
        own, rows = inputs.of(change.each.edit.part), change.rows
        change.apply(own, rows.first + rows.count - len(own))


def _attend(edits: SequenceOf[Edit], state: _State, stop: int, call: Attending) -> None:
    began = time.perf_counter_ns()
    _, count, keys = call.shape
    plan_of(state.seq).tally.tokens += change_attention(edits, call, stop - count, stop - keys)
    state.numbers[1] += time.perf_counter_ns() - began


def _concerns(edit: Edit, rows: Rows) -> bool:
    return any(_within(span, rows.first, rows.count) for span in edit.positions)


def _joined(lists: SequenceOf[list[RowsChange] | None]) -> list[RowsChange] | None:
    """None where one of them is."""
    joined: list[RowsChange] = []
    for each in lists:
        if each is None:
            return None
        joined += each
    return joined


def plan_of(seq: Edited) -> EditPlan:
    """The edits of a sequence that has some."""
    return cast(EditPlan, seq.edits)


def _within(span: tuple[int, int | None], first: int, count: int) -> tuple[int, int] | None:
    """The positions of ``span`` that are among ``count`` ones from ``first`` on."""
    start, stop = max(span[0], first), first + count
    stop = stop if span[1] is None else min(span[1], stop)
    return (start, stop) if start < stop else None
