"""The streams of many texts read by a job, some texts at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from transformers_api.errors import InspectionBusy
from transformers_api.inspection.base import Array
from transformers_api.inspection.questions import Question
from transformers_api.serving.inspect.grid_job import PATIENCE_S, TURN_S
from transformers_api.serving.inspect.jobs import InspectionJob
from transformers_api.serving.inspect.vector_derivation import Place, Streams

Ask = Callable[[Question[Array]], Array]
FIRST_TEXTS = 2  # by which the time is judged


@dataclass(frozen=True)
class DerivationWork:
    """The texts, and the streams (n, L, C) of the first of them, which took ``seconds``."""

    texts: Sequence[Sequence[int]]
    layers: Sequence[int]
    at: Place
    first: Array
    seconds: float

    @classmethod
    def begin(
        cls, texts: Sequence[Sequence[int]], layers: Sequence[int], at: Place, ask: Ask
    ) -> DerivationWork:
        """The work with its first texts read, so that whatever is wrong is known at once."""
        began = time.monotonic()
        first = ask(Streams(texts[:FIRST_TEXTS], layers, at))
        return cls(texts, layers, at, first, time.monotonic() - began)

    @property
    def estimate_s(self) -> float:
        """The time that all texts take at the rate of the first ones."""
        return self.seconds * _tokens(self.texts) / _tokens(self.texts[:FIRST_TEXTS])

    def run(self, job: InspectionJob, ask: Ask, is_busy: Callable[[], bool]) -> Array:
        """The streams of all texts. Raises what ``ask`` does, but for InspectionBusy.

        While ``is_busy``, because others are being answered, half of the time is theirs alone.
        """
        streams, done = [self.first], len(self.first)
        token_s = self.seconds / _tokens(self.texts[:done])
        job.advance(done)
        while done < len(self.texts):
            some = self._turn(done, token_s)
            began = time.monotonic()
            try:
                streams.append(ask(Streams(some, self.layers, self.at)))
            except InspectionBusy as error:
                job.pause(min(error.retry_after or 1.0, PATIENCE_S))
                continue
            seconds = time.monotonic() - began
            done += len(some)
            token_s = seconds / _tokens(some)
            job.advance(done)
            if is_busy():
                job.pause(min(seconds, PATIENCE_S))
        return numpy.concatenate(streams)

    def _turn(self, done: int, token_s: float) -> Sequence[Sequence[int]]:
        """The next texts, which take about as long as a turn; one at least."""
        count, room = 1, TURN_S / max(token_s, 1e-9) - len(self.texts[done])
        for ids in self.texts[done + 1 :]:
            room -= len(ids)
            if room < 0:
                break
            count += 1
        return self.texts[done : done + count]


def _tokens(texts: Sequence[Sequence[int]]) -> int:
    return sum(map(len, texts))
