"""Find stop strings in text that comes in pieces, without sending any part of one."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Cuts a text before the first stop string in it.

    The first is the one that is complete first; of several that end at the same character, the
    longest. So the result never depends on how the text is cut into pieces, and nothing waits
    for a longer stop string once a shorter one is there. Empty strings are ignored.
    """

    def __init__(self, stops: Iterable[str]) -> None:
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
            _, start, self.matched = min(matches)
            return text[:start], self.matched
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
