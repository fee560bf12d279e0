"""The outputs of a replica's answers on their way to one front: few messages for many tokens.

A message through Ray costs more than the step of a small model that its token is from. So the
newest answer of a front, its *carrier*, takes the plain tokens of that front's other answers along
in its own stream: a step of the engine is one message, however many answers it is for.

A carrier may leave at any time, and with it what it had on its way. So each answer keeps the
tokens that others carry for it until its own stream has sent something, and sends all of them
again where one of those carriers ends, however it does. The front knows by their positions what it
has already. What comes first, what comes last and whatever is more than a token is never carried.

A stream that has nothing to send says so every few seconds: a machine that is gone does not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers_api.cluster.messages import Outputs, Sequences, packed, tallies
from transformers_api.engine.base import SequenceRequest, TokenOutput, TokenStream

BEAT_S = 5.0  # a stream is silent for no longer than two of them


class Line:
    """The outputs of one answer. ``is_shared``: its tokens may go with others, or theirs with it.

    Not those of an answer with notes of an observer: they take long to pack.
    """

    def __init__(
        self, name: str, stream: TokenStream, requests: Sequence[SequenceRequest], is_light: bool
    ) -> None:
        self.name = name
        self.stream = stream
        self.is_shared = is_light and len(requests) == 1 and not tallies(requests)
        self.carriers: set[Line] = set()  # that have tokens of it on their way
        self._requests = requests
        self._open = len(requests)
        self._news = asyncio.Event()
        self._sent = 0  # outputs that its own stream has sent
        self._away: list[int] = []  # the tokens after these: others carry them
        self._own: list[TokenOutput] = []  # the outputs after these, for its own stream
        self._is_due = False  # its own stream has to send
        self._is_silent = False  # it has sent nothing since the last beat
        self._carries: dict[str, tuple[int, list[int]]] = {}  # of others: position and tokens

    def read(self) -> list[TokenOutput]:
        """The outputs that have come."""
        outputs = []
        while (output := self.stream.get()) is not None:
            outputs.append(output)
            self._open -= output.finish_reason is not None
        return outputs

    def send(self, outputs: Sequence[TokenOutput] = ()) -> None:
        """Send these by its own stream, and before them what others may have lost."""
        self._own += outputs
        self._is_due = True
        self._news.set()

    def may_give(self, outputs: Sequence[TokenOutput]) -> bool:
        """True where another one may carry these next."""
        is_begun = self._sent > 0 and not self._is_due
        return self.is_shared and is_begun and all(map(is_plain, outputs))

    def give(self, outputs: Sequence[TokenOutput], carrier: Line) -> None:
        """Let another one carry the tokens of these."""
        position = self._sent + len(self._away)
        ids = [output.token_id for output in outputs if output.token_id is not None]
        self._away += ids
        self.carriers.add(carrier)
        carrier._carry(self.name, position, ids)

    def _carry(self, name: str, position: int, ids: list[int]) -> None:
        begins, waiting = self._carries.get(name, (position, []))
        if begins + len(waiting) != position:  # those have gone by its own stream meanwhile
            begins, waiting = position, []
        self._carries[name] = begins, waiting + ids
        self._news.set()

    def beat(self) -> None:
        """Send something, where nothing was sent since the last beat."""
        if self._is_silent:
            self._news.set()
        self._is_silent = True

    async def messages(self) -> AsyncIterator[Outputs]:
        """Its messages, until all of its sequences have ended."""
        while self._open or self._is_due:
            await self._news.wait()
            self._news.clear()
            if self._is_due or self._carries or self._is_silent:
                self._is_silent = False
                yield self._message()

    def _message(self) -> Outputs:
        carried, self._carries = self._carries, {}
        if not self._is_due:
            return Outputs(outputs=(), carried=carried)
        outputs, away, position = self._own, self._away, self._sent
        self._own, self._away, self._is_due = [], [], False
        self._sent += len(away) + len(outputs)
        self.carriers.clear()
        message = packed(outputs, tallies(self._requests))
        return replace(message, position=position, again=away, carried=carried)


class Lines:
    """The answers of one front that a replica is writing. Of one event loop, but for ``_note``."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, Line] = {}  # the newest last
        self._ready: deque[Line] = deque()
        self._is_due = False  # a look at those that are ready
        self._beats: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def line(self, sequences: Sequences, stream: TokenStream) -> Iterator[Line]:
        """The line of an answer, while it is open."""
        name, is_light = sequences.name, not sequences.observe
        line = self._open[name] = Line(name, stream, sequences.requests, is_light)
        stream.notify(lambda: self._note(line))
        self._note(line)
        if self._beats is None:
            self._beats = self._loop.call_later(BEAT_S, self._beat)
        try:
            yield line
        finally:
            del self._open[name]
            if not self._open and self._beats is not None:
                self._beats.cancel()
                self._beats = None
            for other in self._open.values():
                if line in other.carriers:
                    other.send()

    def _beat(self) -> None:
        self._beats = self._loop.call_later(BEAT_S, self._beat)
        for line in self._open.values():
            line.beat()

    def _note(self, line: Line) -> None:
        """Called by the engine's thread: it wakes the loop once for all outputs of a step."""
        self._ready.append(line)
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._send)

    def _send(self) -> None:
        self._is_due = False
        newest = reversed(self._open.values())
        carrier = next((line for line in newest if line.is_shared), None)
        while self._ready:
            line = self._ready.popleft()
            outputs = line.read()
            if not outputs:
                continue
            if carrier is None or carrier is line or not line.may_give(outputs):
                line.send(outputs)
            else:
                line.give(outputs, carrier)


def is_plain(output: TokenOutput) -> bool:
    """True where it is a token and no more."""
    return output == TokenOutput(token_id=output.token_id) and output.token_id is not None
