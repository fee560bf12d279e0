"""Interventions on sequences that asked, in the pass that reads them, beside everybody else's.

``InterveningRunner`` wraps the engine's runner: it works out which rows of a pass are edited, and
has the backend stop where their parts are in memory. ``InterveningSampler`` ends a sequence whose
edits led to numbers that are not finite. Without an edited sequence neither does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from transformers_api.engine.backend import Backend
from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.edited_attention import edited_model
from transformers_api.engine.runners.model_runner import Runner, innermost
from transformers_api.engine.sampling.sampler import TokenSampler
from transformers_api.engine.scheduler import SlotStore
from transformers_api.engine.sequence import SampledToken, Sequence
from transformers_api.inspection.attention import AttentionSource
from transformers_api.inspection.base import LayerAttention, TracePlan
from transformers_api.inspection.edit_plan import EditPlan, InterventionFailed
from transformers_api.inspection.parts import Parts
from transformers_api.inspection.pass_edits import PassEdits, Rows, plan_of
from transformers_api.inspection.prepared_edits import PreparedEdit, prepared
from transformers_api.inspection.token_rows import MOVED, TRACE, Moved


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
        self.moved: Moved = {}

    @contextmanager
    def editing(self, model: Any, start: int, stop: int) -> Iterator[None]:
        """See TextEdits. Raises InterventionFailed."""
        if not self._prepared:
            with torch.inference_mode(False):  # gradients may go through them
                self._prepared = prepared(self.edits, model, *self._places)
        changes = PassEdits(stop - start, True, self._source)
        self.moved.clear()
        changes.add(self, self._prepared, Rows(0, start, stop - start), stop, moved=self.moved)
        with edited_model(model, changes.module_edits(), changes.attention):
            yield
        for edit in changes.finish().values():
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
                rows = Rows(start, first, seq.start + seq.num_cached + width - first)
                context = seq.num_cached + width
                moved = self._moved_of(seq)
                changes.add(seq, self._edits_of(plan_of(seq)), rows, context, seq.slot, moved)
                if self._reads_all:
                    rows.first, rows.count = seq.start + seq.num_cached, width
            start += width
        edits, attention = changes.module_edits(), changes.attention
        is_edited = edits or attention
        with self.backend.editing(self.model, edits, attention) if is_edited else nullcontext():
            logits = self.inner.forward(batch, keep)
        for each, edit in changes.finish().items():
            failed = cast(Sequence, each)
            self.failures[failed] = _reason(failed, f" of layer {edit.layer}")
        return logits

    def clear(self) -> None:
        """See Runner."""
        self.inner.clear()

    def _moved_of(self, seq: Sequence) -> Moved | None:
        """The place of what edits add to the token that is read last, where its trace has parts."""
        trace: TracePlan | None = seq.observe.get(TRACE)
        if trace is None or trace.parts is None:
            return None
        moved: Moved = {}
        seq.extras[MOVED] = moved
        return moved

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
