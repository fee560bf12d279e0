"""Find stop strings in text that comes in pieces, without sending any part of one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers_api.serving.text.vocabulary import Vocabulary

_MARKS = re.compile("[\ud800-\udbff]")  # half surrogate pairs, which no text holds


class StopStrings:
    """Cuts a text before the first stop string in it.

    The first is the one that is complete first; of several that end at the same character, the
    longest. So the result never depends on how the text is cut into pieces, and nothing waits
    for a longer stop string once a shorter one is there. Empty strings are ignored.
    ``included``: the text is cut behind it.
    """

    def __init__(self, stops: Iterable[str], *, included: bool = False) -> None:
        self._included = included
        self._stops = tuple(stop for stop in stops if stop)
        self._reach = max(map(len, self._stops), default=1) - 1  # the most that is ever held back
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be sent, the stop string that has been found).

        After a match the rest of the text is gone, and nothing may be pushed any more.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        matches = [
            (at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0
        ]
        if matches:
            self._held = ""
            end, start, self.matched = min(matches)
            return text[: end if self._included else start], self.matched
        sent = len(text) - self._partial(text)
        self._held = text[sent:]
        return text[:sent], None

    def flush(self) -> str:
        """The text that was held back for a stop string that did not become complete."""
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for length in range(min(self._reach, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


def mark_special_tokens(
    stops: Iterable[str], vocabulary: Vocabulary
) -> tuple[dict[int, str], dict[str, str]]:
    """Marks for special tokens, which no text shows, and the strings to stop at.

    (a mark by token id, the client's stop string by what is looked for). A stop string with the
    text of a special token is looked for as it is, and with the token's mark.
    """
    originals = {stop: stop for stop in stops if stop}
    texts = {vocabulary.added[i]: i for i in vocabulary.special_ids if vocabulary.added[i]}
    if not texts or not any(text in stop for stop in originals for text in texts):
        return {}, originals
    pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    marks: dict[int, str] = {}

    def mark(match: re.Match[str]) -> str:
        return marks.setdefault(texts[match[0]], chr(0xD800 + len(marks)))

    marked = {pattern.sub(mark, stop): stop for stop in originals}
    return marks, marked | originals


def without_marks(text: str) -> str:
    """``text`` as a client may read it."""
    return _MARKS.sub("", text)
