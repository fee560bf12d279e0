"""Control tokens that somebody typed: what is in a message is text, never a turn of its own.

A break stands in each control token of a message when the template writes it, and the prompt is
cut there before it becomes ids: no piece holds the whole token. Tokens that the template itself
writes have no break. (transformers has ``sanitize_control_tokens``, which puts marks around the
tokens; a template that cuts its messages can part them from their marks, and pieces of a token in
two messages still join.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers_api.serving.text.tokenization import token_ids

BREAK = "\ufdd0"  # stands for no character in any text, by Unicode's rules
_PAIR = re.compile(r"<(/?)([\w|]+)>\Z")


class ControlTokens:
    """Those of one tokenizer and the chat template that it comes with."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        added = list(tokenizer.added_tokens_decoder.values())
        special = {str(token.content) for token in added if token.special}
        # Tokens that only are spaces (Gemma has some) are text in templates too.
        others = {
            str(token.content)
            for token in added
            if token.content in source and token.content.strip(" \t\r\n▁")
        }
        self._all = _Breaker(special | others)
        # What models write, and templates look for in their turns: <think>…</think> and such.
        self._of_assistants = _Breaker(special | (others - _pairs(others)))

    def broken(self, value: Any, role: str | None = None) -> Any:
        """``value``, of JSON, with a break in every control token of its texts and names."""
        breaker = self._of_assistants if role == "assistant" else self._all
        return breaker.broken(value)

    def ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a rendered prompt with breaks."""
        first, *rest = text.split(BREAK)
        ids = token_ids(self._tokenizer, first, add_special_tokens=add_special_tokens)
        if not rest:
            return ids
        line_break = token_ids(self._tokenizer, "\n", add_special_tokens=False)
        continued: dict[str, list[int]] = {}  # a token that somebody repeats is read once
        for piece in filter(None, rest):
            if piece not in continued:
                continued[piece] = self._continued(piece, line_break)
            ids += continued[piece]
        return ids

    def _continued(self, piece: str, line_break: list[int]) -> list[int]:
        """After a line break, for SentencePiece puts a space before the beginning of a text."""
        ids = token_ids(self._tokenizer, "\n" + piece, add_special_tokens=False)
        if line_break and ids[: len(line_break)] == line_break:
            return ids[len(line_break) :]
        return token_ids(self._tokenizer, piece, add_special_tokens=False)


class _Breaker:
    """Puts breaks into tokens, and at the ends of texts that another text may complete to one."""

    def __init__(self, tokens: set[str]) -> None:
        longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._longest = max(map(len, tokens), default=0)
        self._beginnings = {token[:size] for token in tokens for size in range(2, len(token))}
        self._ends = {token[-size:] for token in tokens for size in range(2, len(token))}
        # Few, and rare at the ends of texts: most need no closer look.
        self._first_two = {token[:2] for token in tokens if len(token) > 2}
        self._last_two = {token[-2:] for token in tokens if len(token) > 2}

    def broken(self, value: Any) -> Any:
        match value:
            case str():
                return self._text(value)
            case dict():
                return {self._text(name): self.broken(item) for name, item in value.items()}
            case list() | tuple():
                return [self.broken(item) for item in value]
        return value

    def _text(self, text: str) -> str:
        text = text.replace(BREAK, "")
        while self._pattern.search(text):  # what a break leaves of a token may hold another one
            text = self._pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        end, start = text[-self._longest :], text[: self._longest]
        if any(two in end for two in self._first_two) and self._is_end(end):
            text += BREAK
        if any(two in start for two in self._last_two) and self._is_start(start):
            text = BREAK + text
        return text

    def _is_end(self, text: str) -> bool:
        return any(text[-size:] in self._beginnings for size in range(2, len(text) + 1))

    def _is_start(self, text: str) -> bool:
        return any(text[:size] in self._ends for size in range(2, len(text) + 1))


def _pairs(tokens: set[str]) -> set[str]:
    """Those of ``tokens`` that open something which another one closes."""
    return set(_paired(tokens))


def _paired(tokens: set[str]) -> Iterator[str]:
    for token in tokens:
        match = _PAIR.match(token)
        if match and f"<{'' if match[1] else '/'}{match[2]}>" in tokens:
            yield token
