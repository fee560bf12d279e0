"""DRY, "don't repeat yourself": what would go on with a repetition gets less likely.

Defined as in llama.cpp (src/llama-sampler.cpp); the idea is p-e-w's (text-generation-webui #5677).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy
from torch import Tensor, from_numpy

from transformers_api.engine.base import DryParams
from transformers_api.engine.sequence import Sequence

LARGEST_EXPONENT = 88.7228391  # of e, in float32
LARGEST_PENALTY = 1e30  # a logit stays finite
FEW = 64  # tokens that are cheaper to push than to read anew


class DryPenalty:
    """Subtract ``multiplier * base ** (length - allowed_length)`` from tokens that repeat.

    ``length`` is that of the longest end of the text that stood before with the token after it.
    No repetition reaches across a breaker.
    """

    def __init__(self, params: DryParams) -> None:
        self.params = params
        self._tails = params.breakers
        lengths = {len(tail) for tails in self._tails.values() for tail in tails}
        self._tail_lengths = sorted(lengths)
        self._tokens = numpy.empty(0, numpy.int64)
        # For each place but the last, how many tokens up to it are those at the end: (T - 1,)
        self._repeats = numpy.empty(0, numpy.int64)
        self._breaker = (-1, 0)  # the last one's first token, and the number of those behind it

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """See LogitsProcessor."""
        self._read(seq.tokens)
        ids, lengths = self._repeated()
        keep = (ids < len(row)) & ~numpy.isin(ids, self._single(ids))
        ids, lengths = ids[keep], lengths[keep]
        if len(ids):
            penalties = from_numpy(self._penalties(lengths)).to(row.device, row.dtype)
            row[from_numpy(ids).to(row.device)] -= penalties

    def _single(self, ids: numpy.ndarray) -> list[int]:
        """Those that are a breaker on their own: they may come as often as they like."""
        return [i for i in ids.tolist() if () in self._tails.get(i, ())]

    def _read(self, tokens: SequenceOf[int]) -> None:
        count = len(self._tokens)
        fresh = tokens[count:]
        if len(fresh) > FEW:
            self._tokens = numpy.array(tokens, numpy.int64)
            self._repeats = repeats_of_end(tokens)
            self._find_breaker(tokens)
        else:
            for token in fresh:
                self._push(token)

    def _push(self, token: int) -> None:
        before = numpy.concatenate([numpy.zeros(min(len(self._tokens), 1), int), self._repeats])
        self._repeats = numpy.where(self._tokens == token, before + 1, 0)
        self._tokens = numpy.append(self._tokens, token)
        self._note_breaker(len(self._tokens) - 1)

    def _find_breaker(self, tokens: SequenceOf[int]) -> None:
        """Look for the last one in all of ``tokens``."""
        for head in range(len(tokens) - 1, -1, -1):
            for tail in sorted(self._tails.get(tokens[head], ()), key=len, reverse=True):
                if tuple(tokens[head + 1 : head + 1 + len(tail)]) == tail:
                    self._breaker = (head, len(tail))
                    return

    def _note_breaker(self, end: int) -> None:
        """Look for a breaker whose last token is at ``end``."""
        for length in self._tail_lengths:
            head = end - length
            if head >= 0 and (tails := self._tails.get(int(self._tokens[head]))):
                tail = tuple(self._tokens[head + 1 : end + 1].tolist())
                if tail in tails:
                    self._breaker = max(self._breaker, (head, length))

    def _repeated(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Tokens (K,) that would go on with a repetition, and the length of each (K,)."""
        count, params = len(self._tokens), self.params
        window = count if params.last_n < 0 else min(params.last_n, count)
        head, tail = self._breaker
        since_breaker = count - 1 - head - tail
        limit = since_breaker if 0 <= count - 1 - head < window and head >= 0 else window
        if window <= params.allowed_length or limit < params.allowed_length:
            return self._tokens[:0], self._repeats[:0]
        first = count - window
        reach = numpy.minimum(numpy.arange(1, window), limit)  # within the window
        lengths = numpy.minimum(self._repeats[first:], reach)
        enough = lengths >= params.allowed_length
        order = numpy.argsort(lengths[enough], kind="stable")[::-1]
        ids, places = numpy.unique(self._tokens[first + 1 :][enough][order], return_index=True)
        return ids, lengths[enough][order][places]

    def _penalties(self, lengths: numpy.ndarray) -> numpy.ndarray:
        base = self.params.base
        exponents = lengths - self.params.allowed_length
        if base > 1.000001:
            exponents = numpy.minimum(exponents, int(LARGEST_EXPONENT / math.log(base)))
        penalties = self.params.multiplier * numpy.power(float(base), exponents)
        return numpy.asarray(numpy.minimum(penalties, LARGEST_PENALTY))


def repeats_of_end(tokens: SequenceOf[int]) -> numpy.ndarray:
    """For each place but the last, how many tokens up to it are those at the end: (T - 1,).

    The Z-algorithm on the reversed tokens: linear in them.
    """
    turned = tokens[::-1]
    size, left, right = len(turned), 0, 0
    lengths = [0] * size
    for start in range(1, size):
        length = min(right - start, lengths[start - left]) if start < right else 0
        while start + length < size and turned[length] == turned[start + length]:
            length += 1
        lengths[start] = length
        if start + length > right:
            left, right = start, start + length
    return numpy.array(lengths[1:][::-1], numpy.int64)
