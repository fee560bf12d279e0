"""The sequences and the tokens that one forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from transformers_api.engine.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """Sequences, and how many new tokens of each the forward reads.

    Runners that cannot mix get neighbouring slots in order, with equal ``widths``. A sequence alone
    may have a ``draft`` among its tokens: some that perhaps come next, the last to be read.
    """

    sequences: list[Sequence]
    widths: list[int]
    draft: list[int] = field(default_factory=list)

    @property
    def first_slot(self) -> int:
        """The first of the slots."""
        return min(seq.slot for seq in self.sequences)

    @property
    def num_slots(self) -> int:
        """Slots from the first to the last of its sequences."""
        return max(seq.slot for seq in self.sequences) + 1 - self.first_slot

    @property
    def width(self) -> int:
        """Tokens of each sequence, where these are equal."""
        return self.widths[0]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.widths)

    @property
    def strides(self) -> list[int]:
        """Tokens of each sequence, which a draft is not part of."""
        return [width - len(self.draft) for width in self.widths]

    @property
    def ends(self) -> list[bool]:
        """For each sequence True where its last token is read, so that one is sampled."""
        pairs = zip(self.sequences, self.strides, strict=True)
        return [stride == seq.num_pending for seq, stride in pairs]

    @property
    def ending(self) -> list[Sequence]:
        """The sequences whose last token is read."""
        return [seq for seq, ends in zip(self.sequences, self.ends, strict=True) if ends]

    @property
    def is_observed(self) -> bool:
        """True where somebody observes the step of a sequence that a token is sampled for."""
        return any(seq.observe for seq in self.ending)

    @property
    def is_edited(self) -> bool:
        """True where the reading of a sequence is changed."""
        return any(seq.edits is not None for seq in self.sequences)

    @property
    def adapters(self) -> list[Any]:
        """The adapter of each sequence; None: it has none."""
        return [seq.adapter for seq in self.sequences]

    @property
    def is_adapted(self) -> bool:
        """True where a sequence has an adapter."""
        return any(seq.adapter is not None for seq in self.sequences)

    @property
    def keep(self) -> int:
        """Tokens of each sequence whose logits are needed."""
        return 1 + len(self.draft)

    @property
    def parts(self) -> list[Batch]:
        """Batches of neighbours that take the same rope factors; nearly always this one alone."""
        if self.sequences[0].original_window is None:
            return [self]
        kinds = [list(part) for _, part in groupby(self.sequences, key=lambda seq: seq.is_long)]
        return [Batch(part, [self.width] * len(part), self.draft) for part in kinds]

    @property
    def ids(self) -> list[list[int]]:
        """The token ids that the forward reads."""
        pairs = zip(self.sequences, self.strides, strict=True)
        return [seq.upcoming(stride) + self.draft for seq, stride in pairs]
