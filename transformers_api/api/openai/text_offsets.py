"""The offset in a prompt at which each of its tokens begins."""

from __future__ import annotations

from collections.abc import Iterable

_AHEAD = 64  # bytes in which a token is looked for that is not where it should be


def text_offsets(text: str, tokens: Iterable[bytes]) -> list[int]:
    """Characters before each of ``tokens``.

    Tokens that are not in the text, such as a beginning-of-sequence token, take no room. The
    bytes of a character that is spread over several tokens count with its first one. Where a
    tokenizer has changed the text, the next token that is there goes on.
    """
    raw, at, characters = text.encode(), 0, 0
    offsets = []
    for token in tokens:
        if at == 0 and not raw.startswith(token) and raw.startswith(token.removeprefix(b" ")):
            token = token.removeprefix(b" ")  # SentencePiece hides the very first space
        start = raw.find(token, at, at + len(token) + _AHEAD) if token else at
        if start > at and len(token) < 3:  # too short to be sure of
            start = -1
        skipped = _characters(raw[at:start]) if start >= 0 else 0
        offsets.append(characters + skipped)
        if start >= 0:
            at, characters = start + len(token), characters + skipped + _characters(token)
    return offsets


def _characters(raw: bytes) -> int:
    return sum(byte & 0xC0 != 0x80 for byte in raw)
