"""Which sequences run, in which slots, and what the next forward reads. Pure Python.

Running sequences are kept in slots 0..n-1, those that decode before those that prefill, so that a
decode step is always a contiguous range of cache rows: a view, never a gather. Rows behind them
keep the K and V of finished sequences until a new one needs the room; a prompt that begins like one
of them, or like a running one, starts from a copy.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Protocol

from transformers_api.engine.base import FinishReason
from transformers_api.engine.batch import Batch
from transformers_api.engine.cached_rows import FinishedRow, common_prefix
from transformers_api.engine.pass_budget import WORTH_READING, PassBudget
from transformers_api.engine.prompt_turns import PromptTurns
from transformers_api.engine.sequence import Sequence

SHORT = 512  # tokens of a prompt that may go before longer ones, where one pass reads more


class SlotStore(Protocol):
    """The cache rows behind the slots."""

    reuses_prefixes: bool
    in_pieces: bool  # a prompt may be read in several passes

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V per token."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        ...

    @property
    def budget_bytes(self) -> int:
        """Bytes that may be allocated."""
        ...

    def reserve(
        self, rows: int, length: int, prefixes: Mapping[int, int] | None = None
    ) -> tuple[int, int] | None:
        """Make room for ``rows`` rows of ``length`` tokens.

        ``prefixes``: how many first tokens of each row are worth keeping; by default all. Gives the
        rows and the length that there are now: what lay beyond is lost. None when the room cannot
        be had.
        """
        ...

    def copy(self, src: int, dst: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row."""
        ...

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first ``length`` tokens of two rows."""
        ...

    def wipe(self, row: int) -> None:
        """Zero a row."""
        ...


class Scheduler:
    """Waiting and running sequences; what the next pass reads of them.

    ``mixes``: a pass may read pieces of prompts and the tokens of those who decode; else prefill
    and decode take turns. ``costly_context``, ``prefill_alone``: see PassBudget.
    """

    def __init__(
        self,
        cache: SlotStore,
        num_slots: int,
        prefill_chunk: int,
        *,
        mixes: bool = False,
        costly_context: int | None = None,
        prefill_alone: int = 0,
    ) -> None:
        self.cache = cache
        self.num_slots = num_slots
        self.prefill_chunk = prefill_chunk
        self.mixes = mixes
        self.budget = PassBudget(
            prefill_chunk,
            mixes=mixes,
            costly_context=costly_context,
            prefill_alone=prefill_alone,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._finished: dict[int, FinishedRow] = {}
        self.num_decoding = 0  # of running, the first so many
        self._prefilled = 0.0  # the load of passes since the last one of those who decode
        self._turns = PromptTurns()
        self._arrivals = 0
        self._admissions = 0
        self.prompt_tokens = 0  # admitted
        self.cached_tokens = 0  # of them, taken from a row that was there

    @property
    def has_work(self) -> bool:
        """True where ``schedule`` has something to do."""
        return bool(self.waiting or self.running)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of K and V that running sequences may come to need. Advisory, from any thread."""
        rooms = [seq.room for seq in list(self.running)]
        return len(rooms) * max(rooms, default=0) * self.cache.token_bytes

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self._arrive(seq)
        others = self.waiting or len(self.running) > self.num_decoding
        if others and seq.prompt_len > WORTH_READING:  # what is cached makes it a short one
            seq.num_shared = self._longest_prefix(seq)[1]
        self.waiting.append(seq)

    def schedule(self) -> Batch | None:
        """The next pass: a token of each of those who decode, pieces of prompts, or both.

        Pieces of prompts make a step of those who decode longer by a share of its own time, or come
        between two steps for as long, so that a long prompt never starves them.
        """
        self._drop_cancelled()
        decoding = self.running[: self.num_decoding]
        count = min(len(self.waiting) + len(self.running), self.num_slots)
        left = math.inf
        if decoding:
            room = self.budget.room(decoding, count, self._unread + self._prefilled)
            left = room - self._prefilled
        pieces = self._pieces(left)
        load = sum(self.budget.cost(seq, width) for seq, width in pieces)
        self._prefilled += load
        if not decoding or (pieces and not self._is_mixed(pieces, left - load)):
            return Batch(*map(list, zip(*pieces, strict=True))) if pieces else None
        self.budget.charge(decoding, count, self._prefilled)
        self._prefilled = 0.0
        sequences = [*decoding, *(seq for seq, _ in pieces)]
        return Batch(sequences, [1] * len(decoding) + [width for _, width in pieces])

    @property
    def _unread(self) -> int:
        """Tokens of prompts that are there and not yet read."""
        return sum(seq.unread for seq in (*self.running[self.num_decoding :], *self.waiting))

    def _is_mixed(self, pieces: list[tuple[Sequence, int]], left: float) -> bool:
        """True where those who decode take part in the pass that reads these prompts.

        Not while there is room for another prompt: its first token does not wait for that one.
        """
        if not self.mixes or pieces[0][0].is_scoring:
            return False
        others = self.waiting or len(self.running) - self.num_decoding > len(pieces)
        return left < WORTH_READING or not others

    def _pieces(self, left: float) -> list[tuple[Sequence, int]]:
        """Prompts and how many tokens of each are read now, of a load up to ``left``."""
        pieces: list[tuple[Sequence, int]] = []
        if not self.waiting and len(self.running) == self.num_decoding:
            return pieces
        together = self.budget.together(self._unread) if self.mixes else 0.0
        while piece := self._next_piece(pieces, min(left, together) if pieces else left):
            pieces.append(piece)
            cost = self.budget.cost(*piece)
            left, together = left - cost, together - cost
            if not self.mixes or piece[0].is_scoring:
                break
        return pieces

    def _next_piece(
        self, pieces: list[tuple[Sequence, int]], left: float
    ) -> tuple[Sequence, int] | None:
        """A piece of the prompt whose turn it is; None where no more may be read in this pass."""
        if left <= 0 and (pieces or self._prefilled):
            return None
        chunk = self.prefill_chunk - sum(width for _, width in pieces)
        taken = [seq for seq, _ in pieces]
        turn = self._next_turn(min(self.prefill_chunk, SHORT), taken) if chunk > 0 else None
        if turn is None:
            return None
        reading = self.running[self.num_decoding :]
        seq = turn if turn.slot >= 0 else self._reader_of_prefix(turn, reading)
        if seq is None or seq in taken or (pieces and seq.is_scoring):
            return None
        alone = len(self.running) == 1 and not self.waiting and not self.num_decoding
        most = self.budget.alone(seq) if alone else min(chunk, self.budget.piece(seq))
        most = min(most, seq.num_pending)
        least = min(WORTH_READING, most)
        width = int(min(most, max(left, 0) / self.budget.cost(seq, 1)))
        if not self.cache.in_pieces:
            width = seq.num_pending
        elif width < least:
            if pieces or self._prefilled:
                return None
            width = least
        self._turns.count(turn, width)
        return seq, width

    def _next_turn(self, short: int, taken: list[Sequence]) -> Sequence | None:
        """The prompt whose turn it is, of those not ``taken``.

        Without a slot: another one is read for it now.
        """
        reading = self.running[self.num_decoding :]
        free = self.num_slots - len(self.running)
        waiting = list(self.waiting) if free else []
        if reading and free == 1:  # the last slot is for those who do not hold it for long
            waiting = [seq for seq in waiting if seq.unread <= short]
        others = [seq for seq in reading if seq not in taken]
        prompts = others + waiting
        if not prompts:
            return None
        turn = self._turns.pick(prompts, short)
        if turn.slot >= 0 or self._reader_of_prefix(turn, reading) or self._admit(turn):
            return turn
        return self._turns.first_in_line(others) if others else None

    def _reader_of_prefix(self, seq: Sequence, reading: list[Sequence]) -> Sequence | None:
        """One that is reading what ``seq`` begins with, and will leave more of it to be copied."""
        if not (self.cache.reuses_prefixes and seq.takes_prefix):
            return None
        prompt, cached, kind = shareable(seq), None, seq.row_kind
        for other in reading:
            tokens = common_prefix(other.tokens[other.start :], prompt)
            shared = kind.shared(other.row_kind, tokens)
            if shared >= other.num_cached + WORTH_READING:
                cached = self._longest_prefix(seq)[1] if cached is None else cached
                if shared >= cached + WORTH_READING:
                    return other
        return None

    def settle(self, seq: Sequence) -> None:
        """After an advance: move the sequence to those who decode, or to those who prefill."""
        decodes = seq.slot < self.num_decoding
        if decodes and seq.is_prefilling:
            self.num_decoding -= 1
            self._swap(seq.slot, self.num_decoding)
        elif not decodes and not seq.is_prefilling:
            self._swap(seq.slot, self.num_decoding)
            self.num_decoding += 1
        if seq.is_prefilling and not seq.num_cached:  # its window has moved: it is read anew
            self._arrive(seq)

    def finish(self, seq: Sequence) -> None:
        """Free the slot; others move up, and its row stays reusable behind them."""
        if seq.slot < self.num_decoding:
            self.num_decoding -= 1
            self._swap(seq.slot, self.num_decoding)
        last = len(self.running) - 1
        self._swap(seq.slot, last)
        self.running.pop()
        if seq.has_failed:
            self.cache.wipe(last)  # it may hold a NaN, which gets through masks
        elif self.cache.reuses_prefixes and seq.num_cached:
            self._finished[last] = FinishedRow(seq.cached, self._admissions, seq.row_kind)
        seq.slot = -1

    def clear(self) -> None:
        """Let everything go; the sequences have been told."""
        self.running.clear()
        self.waiting.clear()
        self.num_decoding = 0
        self.forget()

    def finished_rows(self) -> dict[int, FinishedRow]:
        """The rows of finished sequences by their slots."""
        return dict(self._finished)

    def adopt(self, rows: Iterable[FinishedRow]) -> None:
        """Take over rows that lie in slots 0, 1, …, that which was used last first."""
        self._finished = dict(enumerate(rows))
        self._admissions = max((row.used for row in self._finished.values()), default=0)

    def forget(self) -> None:
        """Reuse no row that was written before: after a broken step its content is unknown."""
        self._finished.clear()

    def _drop_cancelled(self) -> None:
        if any(seq.cancelled for seq in self.waiting):
            for seq in self.waiting:
                if seq.cancelled:
                    seq.end(FinishReason.ABORT)
            self.waiting = deque(seq for seq in self.waiting if not seq.cancelled)
        for seq in [seq for seq in self.running if seq.cancelled]:
            seq.end(FinishReason.ABORT)
            self.finish(seq)

    def _arrive(self, seq: Sequence) -> None:
        self._arrivals += 1
        seq.arrival = self._arrivals

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence the next slot; False where KV memory does not allow it."""
        length = max(other.room for other in [seq, *self.running])
        lengths = {slot: len(tokens) for slot, tokens in self._cached_rows().items()}
        room = self.cache.reserve(len(self.running) + 1, length, lengths)
        if room is None:
            return False
        self._forget_beyond(*room)
        self.waiting.remove(seq)
        self._admissions += 1
        seq.admitted_at = time.monotonic()
        seq.slot, seq.num_shared = len(self.running), 0
        seq.cached_tokens = seq.num_cached = self._take_prefix(seq, room[0])
        self.running.append(seq)
        self.prompt_tokens += seq.prompt_len
        self.cached_tokens += seq.cached_tokens
        return True

    def _forget_beyond(self, rows: int, length: int) -> None:
        self._finished = {
            slot: row
            for slot, row in self._finished.items()
            if slot < rows and len(row.tokens) <= length
        }

    def _take_prefix(self, seq: Sequence, rows: int) -> int:
        """Put the longest cached prefix of the prompt into the slot; gives its tokens."""
        source, shared = self._longest_prefix(seq)
        if shared and source < seq.slot:
            self._make_free(seq.slot, rows)
            self.cache.copy(source, seq.slot, shared)
        elif shared and source > seq.slot:
            del self._finished[source]
            other = self._finished.pop(seq.slot, None)
            if other:
                self._finished[source] = other
            self.cache.swap(source, seq.slot, max(shared, len(other.tokens) if other else 0))
        elif shared:
            del self._finished[seq.slot]
        else:
            self._make_free(seq.slot, rows)
        return shared

    def _longest_prefix(self, seq: Sequence) -> tuple[int, int]:
        """(slot, tokens) of the row that shares most with the prompt, but for its last token.

        Rows of another kind share less, or nothing.
        """
        if not (self.cache.reuses_prefixes and seq.takes_prefix):
            return -1, 0
        prompt, kind = shareable(seq), seq.row_kind
        kinds = {slot: row.kind for slot, row in self._finished.items()}
        kinds |= {other.slot: other.row_kind for other in self.running}
        shared = {
            slot: kind.shared(kinds[slot], common_prefix(tokens, prompt))
            for slot, tokens in self._cached_rows().items()
        }
        best = max(shared, key=lambda slot: shared[slot], default=-1)
        return best, shared[best] if shared else 0

    def _cached_rows(self) -> dict[int, list[int]]:
        """The tokens whose K and V lie in each row."""
        rows = {slot: row.tokens for slot, row in self._finished.items()}
        return rows | {other.slot: other.cached for other in self.running}

    def _make_free(self, slot: int, rows: int) -> None:
        """Let the slot's finished row go, or rather the least recently used one."""
        row = self._finished.pop(slot, None)
        if row is None:
            return
        free = next((s for s in range(slot + 1, rows) if s not in self._finished), None)
        if free is None:
            oldest = min(self._finished, key=lambda s: self._finished[s].used, default=slot)
            if oldest == slot or self._finished[oldest].used >= row.used:
                return
            free = oldest
        self.cache.copy(slot, free, len(row.tokens))
        self._finished[free] = row

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        one, two = self.running[a], self.running[b]
        self.cache.swap(a, b, max(one.num_cached, two.num_cached))
        one.slot, two.slot = b, a
        self.running[a], self.running[b] = two, one


def shareable(seq: Sequence) -> list[int]:
    """The tokens of a prompt that may be copied: all but the last, which is sampled from."""
    return seq.tokens[seq.start : seq.prompt_len - 1]
