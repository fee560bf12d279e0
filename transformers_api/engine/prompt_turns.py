"""The order in which prompts are read: turns of clients, and of the prompts of one.

Clients share by what they have had: a counter of tokens for each, the least goes first (virtual
token counters, Sheng et al. 2024, arxiv.org/abs/2401.00588). Every other piece may go out of line
to what is soon done, so that a short prompt waits for two pieces at most and a long one still gets
half of them. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from transformers_api.engine.sequence import Sequence


class PromptTurns:
    """The order of prompts that are being read or wait for it. Owned by the engine thread."""

    def __init__(self) -> None:
        self._service: dict[str, int] = {}  # prompt tokens read for each client, from a common zero
        self._first: Sequence | None = None  # in line, at the last pick
        self._line_is_due = False  # the last piece went to another one

    def pick(self, prompts: SequenceOf[Sequence], short: int) -> Sequence:
        """The one of ``prompts`` whose turn it is.

        Of two turns one is that of the first in line: the oldest prompt of the client who has had
        least. The other is that of a prompt with at most ``short`` tokens left, or of the shortest
        that this client has.
        """
        self._level({seq.client for seq in prompts})
        self._first = first = self.first_in_line(prompts)
        if self._line_is_due:
            return first
        if soon_done := [seq for seq in prompts if seq.unread <= short]:
            return self.first_in_line(soon_done)
        own = (seq for seq in prompts if seq.client == first.client)
        return min(own, key=lambda seq: (seq.unread, seq.arrival))

    def first_in_line(self, prompts: SequenceOf[Sequence]) -> Sequence:
        """The oldest of ``prompts``, of those of the client who has had least."""
        return min(prompts, key=lambda seq: (self._service.get(seq.client, 0), seq.arrival))

    def count(self, seq: Sequence, tokens: int) -> None:
        """``tokens`` of a prompt are read in the turn of ``seq``."""
        self._service[seq.client] = self._service.get(seq.client, 0) + tokens
        self._line_is_due = seq is not self._first

    def _level(self, clients: set[str]) -> None:
        """Let nobody have saved turns while asking for nothing, nor pay for what nobody wanted."""
        counted = [self._service[client] for client in clients if client in self._service]
        least = min(counted, default=0)
        ahead = {c: n - least for c, n in self._service.items() if n > least and counted}
        self._service = dict.fromkeys(clients, 0) | ahead
