"""Drafts of what a sequence repeats or has to say; several tokens are checked in one pass.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). The answer is
the same whatever is proposed: a token that was read ahead counts only where it is the one that is
sampled in its place, from logits that are those of a step of its own, with that step's noise.
"""

from __future__ import annotations

from itertools import cycle, islice

from transformers_api.engine.batch import Batch
from transformers_api.engine.sequence import Sequence

SIZES = (4, 3, 2)  # of the endings that are looked for, the longest first


class PromptLookup:
    """Adds a draft to the decode steps of a sequence that is alone: many share a step already.

    A draft has up to ``most`` tokens: twice as many as the last time if all of those were right,
    else about as many as were right, so that text without repetitions takes hardly longer. What a
    constraint says has to come is nearly always right: up to ``forced`` of those.
    """

    def __init__(self, most: int, forced: int = 0) -> None:
        self.most = most
        self.forced = max(forced, most)
        self._seq: Sequence | None = None
        self._follow: dict[tuple[int, ...], int] = {}  # where the last one of each ending ends
        self._read = 0  # tokens whose endings are in ``_follow``
        self._proposed: list[int] = []
        self._count = 0

    def extend(self, batch: Batch) -> None:
        """Let the batch read ahead, if it may and something is likely to come next."""
        if not self.forced or batch.tokens > 1:
            return
        (seq,) = batch.sequences
        if seq.observe or seq.edits is not None or seq.is_prefilling:
            return
        room = min(seq.start + seq.room, seq.max_len) - len(seq.tokens) - 1
        if self.most:
            self._look(seq)
        forced = seq.constraint.draft(min(self.forced, room)) if seq.constraint is not None else ()
        if forced:
            self._proposed, batch.draft = [], list(forced)
        elif self.most:
            proposal = self._proposal(seq.tokens, min(self._count, room))
            self._proposed = batch.draft = proposal
        batch.widths = [1 + len(batch.draft)]

    def _look(self, seq: Sequence) -> None:
        """Learn what the sequence has said since the last time, and what became of that draft."""
        if seq is not self._seq:
            self._seq, self._follow, self._read, self._proposed = seq, {}, 0, []
            self._count = min(2, self.most)
        tokens, proposed = seq.tokens, self._proposed
        if proposed:
            came = tokens[self._read : self._read + len(proposed)]
            right = sum(a == b for a, b in zip(proposed, came, strict=False))
            self._count = min(2 * right, self.most) if right == len(proposed) else max(right, 1)
        for end in range(self._read, len(tokens)):
            for size in SIZES:
                if end >= size:
                    self._follow[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)

    def _proposal(self, tokens: list[int], count: int) -> list[int]:
        """The tokens after the longest ending that occurred before; then they repeat themselves."""
        for size in SIZES:
            place = self._follow.get(tuple(tokens[-size:]))
            if place is not None and count > 0:
                return list(islice(cycle(tokens[place:]), count))
        return []
