"""Counts of the work of models, in plain numbers; ``metrics.py`` shows them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from transformers_api import metric_names as names
from transformers_api.engine.base import EngineListener, FinishReason, SequenceStats
from transformers_api.serving.constraints.listener import ConstraintListener


class Tally:
    """A histogram in plain numbers, written by one thread."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class EngineTally(EngineListener):
    """The engine thread's counts for one model, whichever engine runs it."""

    def __init__(self) -> None:
        histograms = (
            names.FIRST,
            names.GAP,
            names.TOTAL,
            names.QUEUE,
            names.PREFILL,
            names.DECODE,
            names.INFERENCE,
            names.PROMPT,
            names.WRITTEN,
            names.STEP,
        )
        self.tallies = {named: Tally(named.buckets) for named in histograms}
        self.counts = dict.fromkeys(
            (
                *(names.PROMPT_TOKENS, names.WRITTEN_TOKENS, names.QUERIES, names.HITS),
                *(names.DRAFTS, names.DRAFTED, names.ACCEPTED),
            ),
            0,
        )
        self.ends = dict.fromkeys(FinishReason, 0)
        self._step, self._gap = self.tallies[names.STEP], self.tallies[names.GAP]

    def on_step(self, read_tokens: int, gaps: Sequence[float]) -> None:
        """See EngineListener."""
        if read_tokens:
            self._step.add(read_tokens)
        self.counts[names.WRITTEN_TOKENS] += len(gaps)
        for gap in gaps:
            self._gap.add(gap)

    def on_prompt(self, tokens: int, cached_tokens: int, first_token_s: float | None) -> None:
        """See EngineListener."""
        self.counts[names.PROMPT_TOKENS] += tokens
        self.counts[names.QUERIES] += tokens
        self.counts[names.HITS] += cached_tokens
        if first_token_s is not None:
            self.counts[names.WRITTEN_TOKENS] += 1
            self.tallies[names.FIRST].add(first_token_s)

    def on_draft(self, proposed: int, accepted: int) -> None:
        """See EngineListener."""
        self.counts[names.DRAFTS] += proposed > 0
        self.counts[names.DRAFTED] += proposed
        self.counts[names.ACCEPTED] += accepted

    def on_finish(self, stats: SequenceStats) -> None:
        """See EngineListener."""
        self.ends[stats.finish_reason] += 1
        for named, value in (
            (names.TOTAL, stats.total_s),
            (names.QUEUE, stats.queued_s),
            (names.PREFILL, stats.prefill_s),
            (names.DECODE, stats.decode_s),
            (names.INFERENCE, stats.prefill_s + stats.decode_s),
            (names.PROMPT, stats.prompt_tokens),
            (names.WRITTEN, stats.generated_tokens),
        ):
            self.tallies[named].add(value)


class ConstraintTally(ConstraintListener):
    """The time that constraints take. The engine thread's part is in plain numbers."""

    def __init__(self, on_compile: Callable[[float], object]) -> None:
        self._on_compile = on_compile
        self.waits = Tally(names.MASK_WAIT.buckets)

    def on_compile(self, seconds: float) -> None:
        """See ConstraintListener."""
        self._on_compile(seconds)

    def on_wait(self, seconds: float) -> None:
        """See ConstraintListener."""
        self.waits.add(seconds)
