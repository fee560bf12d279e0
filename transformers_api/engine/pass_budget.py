"""The share of a pass that prompts get: by the time that passes take, learned while they run.

The load of a pass is its tokens, each by what it costs beside the first one of a sequence: one far
into a sequence looks at all that comes before it. Pure Python.
"""

from __future__ import annotations

import math

from transformers_api.engine.batch import Batch
from transformers_api.engine.sequence import Sequence

STEPS = 2  # averages for each doubling of the load
MEMORY = 8  # passes that an average remembers
WORTH_READING = 16  # tokens of a prompt: a pass of fewer takes nearly as long
SCORED = 2  # times as long as others take tokens whose logits are all looked at
DELAY = 0.4  # of a decode step, by which prompts may make it longer
LEAST_DELAY = 2.0  # of the pass of one token, which reads the weights: prompts have to get on
WELL_BEGUN = 5  # tokens: until then, a sequence that decodes waits for prompts that came with it
MOST_PIECES = 2  # of a prompt, for which it does at once
SHARED = 3  # steps that wait for these prompts, if they can read them: few gaps are long ones
MANY = 1.5  # times as many decode as there are prompts: they wait for one of these at a time
ALONE_S = 0.25  # of a pass that reads a prompt which is alone: one that comes waits for it
SAVED_SHARE, MOST_SAVED = 0.04, 2.5  # of a decode step, for a short prompt now and then


class PassTimes:
    """Average seconds of a pass by its load.

    Between the loads that were observed times are interpolated, beyond them they are proportional
    to the load.
    """

    def __init__(self) -> None:
        self._averages: dict[int, tuple[float, float, int]] = {}  # load, seconds, passes
        self._points: list[tuple[float, float]] = []  # load, seconds; by load

    def observe(self, load: float, seconds: float) -> None:
        """Note a pass."""
        step = round(STEPS * math.log2(max(load, 1)))
        old_load, old_seconds, count = self._averages.get(step, (0.0, 0.0, 0))
        count = min(count + 1, MEMORY)
        self._averages[step] = (
            old_load + (load - old_load) / count,
            old_seconds + (seconds - old_seconds) / count,
            count,
        )
        self._points = [each[:2] for _, each in sorted(self._averages.items())]

    def seconds(self, load: float) -> float:
        """The time of a pass; 0 before the first was observed."""
        before = (0.0, 0.0)
        for point in self._points:
            if load <= point[0]:
                share = (load - before[0]) / (point[0] - before[0])
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1] * load / before[0] if before[0] else 0.0

    def load(self, seconds: float) -> float:
        """The largest load that takes no longer; infinite before the first pass was observed."""
        if not self._points:
            return math.inf
        after = None
        for point in reversed(self._points):
            if point[1] <= seconds:
                return self._between(point, after, seconds)
            after = point
        return self._between((0.0, 0.0), after, seconds)

    @staticmethod
    def _between(
        before: tuple[float, float], after: tuple[float, float] | None, seconds: float
    ) -> float:
        if after is None:
            return before[0] * seconds / before[1]
        share = (seconds - before[1]) / (after[1] - before[1])
        return before[0] + share * (after[0] - before[0])


class PassBudget:
    """Sizes of the pieces of prompts.

    ``mixes``: see Scheduler. ``costly_context``: tokens before a token that cost as much as the
    token itself; None where the time of a pass hardly depends on them. ``prefill_alone``: tokens of
    a prompt that is alone; 0: as many as of others.
    """

    def __init__(
        self,
        prefill_chunk: int,
        *,
        mixes: bool = False,
        costly_context: int | None = None,
        prefill_alone: int = 0,
    ) -> None:
        self.prefill_chunk = prefill_chunk
        self.prefill_alone = prefill_alone
        self.mixes = mixes
        self.costly_context = costly_context
        self.times = PassTimes()
        self._saved = 0.0  # seconds that a step may take longer than most

    def load_of(self, batch: Batch) -> float:
        """The load of a pass, before its sequences have advanced."""
        return sum(map(self.cost, batch.sequences, batch.widths))

    def cost(self, seq: Sequence, width: int) -> float:
        """The load of the next ``width`` tokens of a sequence."""
        cost = float(width * SCORED if seq.is_scoring else width)
        if self.costly_context is not None:
            cost *= 1 + (seq.num_cached + width / 2) / self.costly_context
        return cost

    def piece(self, seq: Sequence) -> int:
        """Most tokens of a prompt in a pass, which takes about as long wherever in it they are."""
        if self.costly_context is None:
            return self.prefill_chunk
        share = self.costly_context / (self.costly_context + seq.num_cached)
        if seq.is_scoring:
            share /= SCORED
        return max(round(self.prefill_chunk * share), min(WORTH_READING, self.prefill_chunk))

    def alone(self, seq: Sequence) -> int:
        """Most tokens of a prompt in a pass for which nobody waits.

        Each pass reads all weights, so these are as few as they may be by the times that were
        measured, and equally long: a short one at the end takes nearly as long as the others.
        """
        measured = self.times.load(ALONE_S)
        most = min(measured, self.prefill_alone)
        if measured == math.inf or most <= self.prefill_chunk or seq.is_scoring:
            return self.piece(seq)
        unread = self.cost(seq, seq.num_pending)
        passes = math.ceil(unread / most)
        return self._width(seq, unread / passes)

    def _width(self, seq: Sequence, load: float) -> int:
        """The tokens of a prompt that are this load; see ``cost``."""
        if self.costly_context is None:
            return math.ceil(load)
        first = 1 + seq.num_cached / self.costly_context
        root = math.sqrt(first**2 + 2 * load / self.costly_context)
        return math.ceil(self.costly_context * (root - first))

    def together(self, unread: float) -> float:
        """The load of prompts that one pass reads, of ``unread`` tokens: a piece, and others.

        At least what takes no longer than two tokens. More where many wait and a pass has a time of
        its own, whatever it reads: of ``n`` prompts in groups of ``g`` the mean first token comes
        after ``n / g + 1`` halves of a pass, soonest where a group is the root of ``unread`` times
        the load that takes as long as reading nothing.
        """
        least = self.times.load(LEAST_DELAY * self.times.seconds(1))
        if least >= unread:
            return least
        once, twice = self.times.seconds(least), self.times.seconds(2 * least)
        if twice <= once:
            return unread
        nothing = max(2 * once - twice, 0) / (twice - once) * least
        return max(least, math.sqrt(unread * nothing))

    def room(self, decoding: list[Sequence], sequences: int, unread: float) -> float:
        """The load of prompts that may be read before the next token of those who decode.

        ``sequences`` are there in all. A step may take a share longer than one in which all of them
        decode, so that tokens come evenly while more and more do; sometimes it may take longer, see
        ``charge``. It may take twice the time of a token longer in any case; for each prompt, where
        not many are made to wait for these. Where all have just begun, as when many come at once,
        it may take as long as a whole piece of a prompt, or two where so much is ``unread``: a few
        long waits for everybody, equally long, and none once answers are under way.
        """
        step, limit = self._limit(decoding, sequences)
        if limit == math.inf:
            steps = max(1, SHARED - max(seq.num_output for seq in decoding))
            most = MOST_PIECES * self.prefill_chunk
            return max(self.prefill_chunk, min(unread / steps, most))
        limit += self._saved
        if not self.mixes:
            return min(self.times.load(limit - step), self.prefill_chunk)
        load = self._step_load(decoding)
        return min(self.times.load(limit) - load, self.prefill_chunk)

    def charge(self, decoding: list[Sequence], sequences: int, prompts: float) -> None:
        """Note that prompts of this load were read for a step of those who decode.

        A step that takes longer than it mostly may uses up what others have saved, each a small
        part of its time: so a short prompt is read at once if there was none for a while.
        """
        step, limit = self._limit(decoding, sequences)
        if self.mixes:
            spent = self.times.seconds(self._step_load(decoding) + prompts)
        else:
            spent = step + self.times.seconds(prompts)
        saved = self._saved - max(spent - limit, 0)
        self._saved = max(min(saved + SAVED_SHARE * step, MOST_SAVED * step), 0)

    def _limit(self, decoding: list[Sequence], sequences: int) -> tuple[float, float]:
        """Seconds of a step of those who decode, and of one with prompts."""
        load, count = self._step_load(decoding), len(decoding)
        least, prompts = LEAST_DELAY * self.times.seconds(1), sequences - count
        if prompts and all(seq.num_output <= WELL_BEGUN for seq in decoding):
            least = math.inf  # and no more than a piece
        elif MANY * prompts >= count:
            least *= prompts
        step, in_the_end = (self.times.seconds(n) for n in (load, load * sequences / count))
        return step, max(step + least, (1 + DELAY) * in_the_end)

    def _step_load(self, decoding: list[Sequence]) -> float:
        return sum(self.cost(seq, 1) for seq in decoding)
