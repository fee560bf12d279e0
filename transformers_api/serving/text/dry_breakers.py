"""The texts that no repetition reaches across, as tokens that spell them."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.vocabulary import Vocabulary

MOST_TAIL = 20  # tokens, as in llama.cpp
MOST_CACHED = 4  # sets of texts of a model; each may name every token
BORDER = b"\xff"  # between tokens: in no text, so none is found across it
ALONE = frozenset({()})

Breakers = Mapping[int, frozenset[tuple[int, ...]]]


class Spellings:
    """The bytes of all tokens of a vocabulary, to be searched at once."""

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        self.tokens = [vocabulary.token_bytes(i) for i in range(size)]
        self._joined = BORDER.join(self.tokens)
        lengths = (len(token) + len(BORDER) for token in self.tokens)
        self._starts = list(accumulate(lengths, initial=0))

    def holding(self, text: bytes) -> Iterator[int]:
        """The tokens that hold ``text``."""
        at = self._joined.find(text)
        while at >= 0:
            token = bisect_right(self._starts, at) - 1
            yield token
            at = self._joined.find(text, self._starts[token + 1])

    def ending(self, heads: Mapping[bytes, object]) -> Iterator[tuple[int, bytes]]:
        """The tokens that end in one of ``heads``, with it."""
        longest, last = max(map(len, heads), default=0), {head[-1] for head in heads}
        for i, token in enumerate(self.tokens):
            if token and token[-1] in last:
                for length in range(1, min(len(token), longest) + 1):
                    if token[-length:] in heads:
                        yield i, token[-length:]


def sequence_breakers(model: LoadedModel, texts: Sequence[str]) -> Breakers:
    """By first token, what may follow of each sequence of tokens in which one of ``texts`` ends.

    A token that holds a text breaks alone: (); one that ends as a text begins does with the
    tokens of the text's rest. Linear in the vocabulary, whatever the number of texts.
    """
    cached, key = model.vocabulary.cached_breakers, tuple(dict.fromkeys(texts))
    if key not in cached:
        if len(cached) >= MOST_CACHED:
            cached.pop(next(iter(cached)))
        cached[key] = _breakers(model, key)
    return cached[key]


def _breakers(model: LoadedModel, texts: Sequence[str]) -> Breakers:
    spellings = model.vocabulary.spellings
    if not isinstance(spellings, Spellings):
        spellings = Spellings(model.vocabulary, model.engine.vocab_size)
        model.vocabulary.spellings = spellings
    tails: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    holders = {text: set(spellings.holding(_raw(text))) for text in texts}
    heads: defaultdict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for text in texts:
        for cut in range(1, len(text)):
            heads[_raw(text[:cut])].append((text, cut))
    rests: dict[str, tuple[int, ...]] = {}
    for i, head in spellings.ending(heads):
        for text, cut in heads[head]:
            if i not in holders[text]:
                rest = text[cut:]
                if rest not in rests:
                    ids = chat_template.encode_text(model, rest, False)
                    rests[rest] = tuple(ids[:MOST_TAIL])
                tails[i].add(rests[rest])
    alone = set().union(*holders.values())
    single = dict.fromkeys(alone - tails.keys(), ALONE)
    both = {i: frozenset(rest | {()} if i in alone else rest) for i, rest in tails.items()}
    return {**single, **both}


def _raw(text: str) -> bytes:
    return text.encode(errors="replace")
