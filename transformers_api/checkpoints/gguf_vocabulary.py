"""Vocabularies of GGUF files as byte pairs: pieces with their ids, and merges, best first.

A vocabulary has up to 262,000 pieces, so each is looked at as seldom as it can be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from transformers_api.errors import ModelLoadFailed

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are matched whole in a text
SPACE = "▁"
GEMMA = frozenset({"gemma", "gemma2", "gemma3"})  # architectures
Merge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces and merges of a BPE. Of a piece that is there twice the first id counts."""

    vocab: dict[str, int]
    merges: list[Merge]

    def check(self) -> None:
        """Raise ModelLoadFailed for a merge of what is no piece, or into what is none."""
        vocab = self.vocab
        for left, right in self.merges:
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise ModelLoadFailed(
                    f"the vocabulary cannot be read: the merge of {left!r} and {right!r} is of or "
                    "into what is no token"
                )


def byte_level(metadata: Mapping[str, Any]) -> Vocabulary:
    """GPT-2's: every byte has a letter. Tokens that are spelt otherwise are spelt so here."""
    spelling = bytes_to_unicode()  # type: ignore[no-untyped-call]
    foreign = re.compile(f"[^{re.escape(''.join(spelling.values()))}]").search
    tokens, whole = metadata["tokenizer.ggml.tokens"], {index for index, _ in added(metadata)}
    if unspelt := [i for i, token in enumerate(tokens) if foreign(token) and i not in whole]:
        tokens = list(tokens)
        for index in unspelt:
            tokens[index] = "".join(spelling[byte] for byte in tokens[index].encode())
    return Vocabulary(_ids(tokens), _merges(metadata))


def sentencepiece(metadata: Mapping[str, Any]) -> Vocabulary:
    """SentencePiece's byte pairs, whose merges follow from the scores of the pieces."""
    tokens = metadata["tokenizer.ggml.tokens"]
    if "tokenizer.ggml.merges" in metadata:
        return Vocabulary(_ids(tokens), _merges(metadata))
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise ModelLoadFailed("tokenizer.ggml.scores is missing or too short")
    vocab = _ids(tokens)
    by_piece = dict(zip(tokens, scores, strict=False))
    scored = [(by_piece[piece], pair) for piece in by_piece for pair in _halves(piece, vocab)]
    scored.sort(key=lambda each: (each[0], len(each[1][0]), len(each[1][1])), reverse=True)
    return Vocabulary(vocab, [pair for _, pair in scored])


def gemma(metadata: Mapping[str, Any]) -> Vocabulary:
    """Gemma's pieces, whose order in the file is that of the merges.

    Tokens of spaces alone are stored as spaces there.
    """
    tokens = [
        SPACE * len(token) if " " in token and not token.strip() else token
        for token in metadata["tokenizer.ggml.tokens"]
    ]
    if "tokenizer.ggml.merges" in metadata:
        return Vocabulary(_ids(tokens), _merges(metadata))
    vocab = _ids(tokens)
    return Vocabulary(vocab, [pair for piece in vocab for pair in reversed(_halves(piece, vocab))])


def added(metadata: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(id, kind) of the tokens that are matched whole."""
    kinds = (metadata.get("tokenizer.ggml.token_type") or [])[
        : len(metadata["tokenizer.ggml.tokens"])
    ]
    return [(index, kind) for index, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]


def _ids(tokens: list[str]) -> dict[str, int]:
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) < len(tokens):  # some are there twice
        vocab = {}
        for index, token in enumerate(tokens):
            vocab.setdefault(token, index)
    return vocab


def _halves(piece: str, vocab: Mapping[str, int]) -> list[Merge]:
    """The pairs that make ``piece``, by the length of the first."""
    return [
        (piece[:at], piece[at:])
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]


def _merges(metadata: Mapping[str, Any]) -> list[Merge]:
    """The pairs, best first. A part may itself begin with a space."""
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelLoadFailed("tokenizer.ggml.merges is missing")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left:
            left, _, right = merge[1:].partition(" ")
            left = merge[:1] + left
        pairs.append((left, right))
    return pairs


READERS: Mapping[str, Callable[[Mapping[str, Any]], Vocabulary]] = {
    "gpt2": byte_level,
    "llama": sentencepiece,
    "gemma4": gemma,
}


def read(metadata: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a file; None for one that is no BPE. Raises ModelLoadFailed."""
    kind = str(metadata.get("tokenizer.ggml.model"))
    if kind == "llama" and metadata.get("general.architecture") in GEMMA:
        return gemma(metadata)
    reader = READERS.get(kind)
    return reader(metadata) if reader else None
