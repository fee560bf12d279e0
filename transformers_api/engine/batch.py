"""The sequences and the tokens that one forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from transformers_api.engine.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """Sequences in slot order, and how many new tokens of each the forward reads.

    A sequence alone may have a ``draft`` among them: tokens that perhaps come next, the last to be
    read.
    """

    sequences: list[Sequence]
    width: int
    draft: list[int] = field(default_factory=list)

    @property
    def first_slot(self) -> int:
        """Slot of the first sequence; the others follow without a gap."""
        return self.sequences[0].slot

    @property
    def reaches_end(self) -> bool:
        """True where the forward reads the last token of its sequences, so that one is sampled."""
        return self.stride == self.sequences[0].num_pending

    @property
    def stride(self) -> int:
        """Tokens of each sequence, which a draft is not part of."""
        return self.width - len(self.draft)

    @property
    def keep(self) -> int:
        """Tokens of each sequence whose logits are wanted."""
        return 1 + len(self.draft)

    @property
    def parts(self) -> list[Batch]:
        """Batches of neighbours that take the same rope factors; nearly always this one alone."""
        if self.sequences[0].original_window is None:
            return [self]
        kinds = groupby(self.sequences, key=lambda seq: seq.is_long)
        return [Batch(list(part), self.width, self.draft) for _, part in kinds]

    @property
    def ids(self) -> list[list[int]]:
        """The token ids that the forward reads."""
        return [seq.upcoming(self.stride) + self.draft for seq in self.sequences]
