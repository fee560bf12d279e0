"""The texts that no repetition reaches across, as tokens that spell them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

MOST_TAIL = 20  # tokens, as in llama.cpp
_MOST_CACHED = 256

Breakers = Mapping[int, frozenset[tuple[int, ...]]]


def sequence_breakers(model: LoadedModel, texts: Iterable[str]) -> Breakers:
    """By first token, what may follow of each sequence of tokens in which one of ``texts`` ends.

    A token that holds a text breaks alone: (); one that ends as a text begins does with the
    tokens of the text's rest.
    """
    merged: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for text in dict.fromkeys(texts):
        for token, tail in _breakers(model, text):
            merged[token].add(tail)
    return {token: frozenset(tails) for token, tails in merged.items()}


def _breakers(model: LoadedModel, text: str) -> list[tuple[int, tuple[int, ...]]]:
    cached = model.vocabulary.cached_breakers
    if text not in cached:
        if len(cached) >= _MOST_CACHED:
            cached.clear()
        cached[text] = _spelt(model, text)
    return cached[text]


def _spelt(model: LoadedModel, text: str) -> list[tuple[int, tuple[int, ...]]]:
    vocabulary = model.vocabulary
    raw = text.encode(errors="replace")
    spellings = [(i, vocabulary.token_bytes(i)) for i in range(model.engine.vocab_size)]
    holders = {i for i, token in spellings if raw in token}
    breakers: list[tuple[int, tuple[int, ...]]] = [(i, ()) for i in sorted(holders)]
    for cut in range(1, len(text)):
        head = text[:cut].encode(errors="replace")
        heads = [i for i, token in spellings if token.endswith(head) and i not in holders]
        if heads:
            tail = tuple(chat_template.encode_text(model, text[cut:], False)[:MOST_TAIL])
            breakers += [(i, tail) for i in heads]
    return breakers
