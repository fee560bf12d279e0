"""Passes that read prompts and write answers, without a model: the scheduler by a machine's times.

    python -m benchmarks.mixed
    python -m benchmarks.mixed --pass-ms 8 --answer-ms 1 --prompt-ms 1.2 --tokens 542

A pass takes a time of its own, and some for each token of a prompt and of an answer; `--noise`
makes passes longer at random. So many requests come at once: how even their tokens come over the
whole run, and when the first ones do. No other process has a share in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.scheduler import Scheduler
from transformers_api.engine.sequence import SampledToken, Sequence

APART_S = 0.004  # from one request to the next: what HTTP and the tokenizer take
VOCABULARY = 1000
WINDOW = 4096


@dataclass(frozen=True)
class Times:
    """Milliseconds of a pass. The defaults: bfloat16 on AMX, two busy cores, see decision 20."""

    pass_ms: float = 18.4
    answer_ms: float = 0.78  # a token that is written: its logits, too
    prompt_ms: float = 0.44  # a token that is read
    noise: float = 0.0  # standard deviation of what others add, as a share

    def seconds(self, batch: Batch, rng: random.Random) -> float:
        """What this pass takes."""
        written = sum(not seq.is_prefilling for seq in batch.sequences)
        read = batch.tokens - written
        ms = self.pass_ms + self.answer_ms * written + self.prompt_ms * read
        return ms / 1e3 * (1 + self.noise * abs(rng.gauss(0, 1)))


@dataclass(frozen=True)
class Evenness:
    """What the clients see; milliseconds."""

    gap_ms: float  # the median of all gaps of all answers
    gap_p95_ms: float
    gap_most_ms: float
    first_ms: float  # the median of first tokens
    first_mean_ms: float
    first_p95_ms: float

    @property
    def ratio(self) -> float:
        """How even the tokens come."""
        return self.gap_p95_ms / self.gap_ms


class Machine:
    """A scheduler whose passes take ``times``; its clock goes on with them."""

    def __init__(self, times: Times, *, slots: int = 32, seed: int = 0) -> None:
        room: Any = SimpleNamespace(reuses_prefixes=False, in_pieces=True, token_bytes=0)
        room.reserve = lambda rows, length, prefixes: (slots, WINDOW)
        room.swap = lambda a, b, length: None
        self.scheduler = Scheduler(room, slots, 256, mixes=True, prefill_alone=1024)
        self.times = times
        self.now = 0.0
        self._rng = random.Random(seed)

    def at_once(self, requests: int, prompt: int, tokens: int) -> Evenness:
        """So many requests of as many tokens, until all are answered."""
        came = [self.now + APART_S * number for number in range(requests)]
        coming = deque(zip(came, (self._sequence(prompt, tokens) for _ in came), strict=True))
        moments: dict[int, list[float]] = {id(seq): [] for _, seq in coming}
        while coming or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self.now = max(self.now, coming[0][0])
            while coming and coming[0][0] <= self.now:
                self.scheduler.add(coming.popleft()[1])
            batch = self.scheduler.schedule()
            if batch is None:
                raise RuntimeError("nothing can run")
            for seq in self._pass(batch):
                moments[id(seq)].append(self.now)
        return _evenness(came, list(moments.values()))

    def _pass(self, batch: Batch) -> list[Sequence]:
        """Read a batch; gives those that wrote a token."""
        seconds, ending = self.times.seconds(batch, self._rng), batch.ending
        self.now += seconds
        self.scheduler.budget.times.observe(self.scheduler.budget.load_of(batch), seconds)
        for seq, width, ends in zip(batch.sequences, batch.widths, batch.ends, strict=True):
            seq.advance(width, SampledToken(1) if ends else None)
        for seq in reversed(batch.sequences):
            self.scheduler.finish(seq) if seq.is_finished else self.scheduler.settle(seq)
        return ending

    def _sequence(self, prompt: int, tokens: int) -> Sequence:
        ids = [self._rng.randrange(VOCABULARY) for _ in range(prompt)]
        request = SequenceRequest(ids, SamplingParams(max_tokens=tokens, ignore_eos=True))
        stream = TokenStream(1, lambda _: None)
        return Sequence(request, stream, 0, eos_token_ids=frozenset(), max_model_len=WINDOW)


def _evenness(came: list[float], moments: list[list[float]]) -> Evenness:
    gaps = sorted(1e3 * (b - a) for each in moments for a, b in itertools.pairwise(each))
    first = sorted(1e3 * (each[0] - began) for began, each in zip(came, moments, strict=True))
    return Evenness(
        gap_ms=statistics.median(gaps),
        gap_p95_ms=gaps[int(0.95 * (len(gaps) - 1))],
        gap_most_ms=gaps[-1],
        first_ms=statistics.median(first),
        first_mean_ms=statistics.mean(first),
        first_p95_ms=first[int(0.95 * (len(first) - 1))],
    )


def warm(times: Times, seed: int = 0) -> Machine:
    """A machine that has served some requests, and knows its times."""
    machine = Machine(times, seed=seed)
    for requests, prompt, tokens in ((1, 62, 16), (1, 542, 16), (8, 62, 8), (32, 62, 8)):
        machine.at_once(requests, prompt, tokens)
    return machine


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in vars(Times()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=62, help="of each prompt")
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    times = Times(options.pass_ms, options.answer_ms, options.prompt_ms, options.noise)
    evenness = warm(times).at_once(options.streams, options.tokens, options.max_tokens)
    figures = {"ratio": evenness.ratio, **vars(evenness)}
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
