"""The identity of a cache row: keys and values depend on more than the tokens."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowKind:
    """The way in which the tokens of a row were read.

    ``is_long``: with the rope factors of long sequences. ``adapter``: the key of one; None: none.
    ``edits``: what changes the reading from the token ``unedited`` on; "": nothing does.
    """

    is_long: bool = False
    adapter: Hashable = None
    edits: str = ""
    unedited: int = 0

    def shared(self, other: RowKind, tokens: int) -> int:
        """The part of ``tokens`` equal first tokens whose keys and values are equal, too."""
        if (self.is_long, self.adapter) != (other.is_long, other.adapter):
            return 0
        if self.edits == other.edits:
            return tokens
        limits = [kind.unedited for kind in (self, other) if kind.edits]
        return min(tokens, *limits)
