"""Keys and values of finished sequences, kept while their model sleeps.

A conversation that goes on after another model was in memory need not be read again. The bits are
those that were there: a model that wakes up has the weights that it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from transformers_api.engine.cached_rows import FinishedRow

if TYPE_CHECKING:
    from transformers_api.engine.kv_cache import SlotCache
    from transformers_api.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Conversation:
    """A row of a cache: its tokens, and their keys and values (H, T, D) of each layer."""

    row: FinishedRow
    states: list[Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(state.nbytes for state in self.states)


def conversations_of(
    finished: Mapping[int, FinishedRow], cache: SlotCache, most_bytes: int
) -> list[Conversation]:
    """Copies of the rows that were used last, as many as fit into ``most_bytes``; last ones first.

    ``finished``: by their slots.
    """
    left = most_bytes
    made = []
    for slot in sorted(finished, key=lambda slot: -finished[slot].used):
        length = len(finished[slot].tokens)
        size = length * cache.token_bytes
        if 0 < size <= left:
            left -= size
            made.append(Conversation(finished[slot], cache.read_row(slot, length)))
    return made


def restore_conversations(
    conversations: Sequence[Conversation], scheduler: Scheduler, cache: SlotCache
) -> None:
    """Put them back, into an engine that has not run yet, as many as there is room for."""
    longest = max((len(each.row.tokens) for each in conversations), default=0)
    count = min(len(conversations), scheduler.num_slots)
    while count and not _has_room(cache, count, longest, scheduler.num_slots):
        count -= 1
    if not count:
        return
    cache.allocate()
    for slot, each in enumerate(conversations[:count]):
        cache.write_row(slot, each.states)
    scheduler.adopt([each.row for each in conversations[:count]])


def _has_room(cache: SlotCache, rows: int, length: int, most_rows: int) -> bool:
    """Make room for so many rows, and for another one, so that the next request takes none."""
    another = min(rows + 1, most_rows)
    return any(cache.reserve(count, length) is not None for count in (another, rows))
