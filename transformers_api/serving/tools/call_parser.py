"""From the text of a model, piece by piece, to parts: what it thinks, says and calls.

One state machine for all formats. A piece is held back only while it may be the beginning of a
literal of the format; how the text is cut into pieces never changes the parts, but where they are
cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from transformers_api.serving.tools.call_format import CallFormat
from transformers_api.serving.tools.call_readers import (
    MARKS,
    NAME,
    NOTHING,
    CallReader,
    literal_pattern,
    mids_pattern,
    reader,
)
from transformers_api.serving.tools.spec import (
    CallStart,
    Content,
    Part,
    Reasoning,
)

_AT_FRONT = r"\A"


class AnswerParser:
    """Reads one answer. ``schemas`` are the parameters of the tools, by name.

    ``style`` None: there are no calls. ``thought`` are the marks around reasoning, None where there
    is none; ``is_thinking``: the prompt has opened it. ``openings``: headers before what is said.
    ``must_call``: what is no call is the beginning of one.
    """

    def __init__(
        self,
        style: CallFormat | None,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        thought: tuple[str, str] | None = None,
        is_thinking: bool = False,
        openings: Sequence[str] = (),
        must_call: bool = False,
    ) -> None:
        self._style = style
        self._must_call = must_call
        self.schemas = schemas
        self._thought = thought
        self._text = ""
        self._parts: list[Part] = []
        self._is_last = False
        self._state: Callable[[], bool] = self._begin
        self._held = ""  # white space after content
        self._has_content = False
        self._trims = False  # white space before content
        self.calls = 0  # whose names are clear
        self._call_count = 0  # with those that end before their name does
        self.call_starts_at = 0  # the place of the first call in the whole text
        self._pushed = 0  # characters of that
        self._openings = openings
        if thought is None:
            self._state = self._opening
        elif is_thinking:
            self._state = self._reasoning
        self._starts = [] if style is None else _starts(style)
        self._reader: CallReader | None = None

    @property
    def is_thinking(self) -> bool:
        """True where the next text is of a thought."""
        return self._state == self._reasoning

    def push(self, piece: str) -> list[Part]:
        """The parts that become clear with the next piece."""
        self._text += piece
        self._pushed += len(piece)
        self._parts = []
        while self._state():
            pass
        for part in self._parts:
            if isinstance(part, CallStart):
                self.calls += 1
                part.name = MARKS.sub("", part.name)
            else:
                part.text = MARKS.sub("", part.text)
        return [part for part in self._parts if isinstance(part, CallStart) or part.text]

    def note(self, parts: Sequence[Part]) -> None:
        """Count the calls among parts that somebody else has told apart."""
        self.calls += sum(isinstance(part, CallStart) for part in parts)

    def finish(self) -> list[Part]:
        """The rest, at the end of the answer."""
        self._is_last = True
        parts = self.push("")
        if self._held and self._has_content and not self._call_count:
            parts.append(Content(self._held))
            self._held = ""
        return parts

    # Each state takes what it can off ``_text``; True: another one goes on with the rest.

    def _begin(self) -> bool:
        assert self._thought is not None
        mark, text = self._thought[0], self._text.lstrip()
        if mark and text.startswith(mark):
            self._text = text[len(mark) :]
            self._state = self._reasoning
            return True
        if mark and mark.startswith(text) and not self._is_last:
            return False
        self._state = self._opening
        return True

    def _opening(self) -> bool:
        text = self._text.lstrip()
        if any(opening.startswith(text) for opening in self._openings) and not self._is_last:
            return False
        opening = next(filter(text.startswith, self._openings), "")
        if opening:
            self._text, self._trims = text[len(opening) :], True
        self._state = self._content
        return True

    def _reasoning(self) -> bool:
        assert self._thought is not None
        close = self._thought[1]
        before, mark, after = self._text.partition(close)
        if mark:
            self._think(before)
            self._text, self._state, self._trims = after, self._opening, True
            return True
        size = len(before) - (0 if self._is_last else _overlap(before, close))
        self._think(before[:size])
        self._text = before[size:]
        return False

    def _think(self, text: str) -> None:
        if text:
            self._parts.append(Reasoning(text))

    def _content(self) -> bool:
        first: Any = None
        for pattern in self._starts:
            if self._has_content and pattern.pattern.startswith(_AT_FRONT):
                continue  # what is behind other text is no call
            match = pattern.search(self._text, partial=not self._is_last)
            if match and (first is None or _order(match) < _order(first)):
                first = match
        if first is None:
            self._say(self._text)
            self._text = ""
            return False
        self._say(self._text[: first.start()])
        if first.partial:
            self._text = self._text[first.start() :]
            return False
        self.call_starts_at = self._pushed - len(self._text) + first.start()
        self._text = self._text[first.end(1) :]
        self._state = self._call
        return True

    def _say(self, text: str) -> None:
        if self._must_call:
            return
        text = self._held + text
        if self._trims and not self._has_content:
            text = text.lstrip()
        content = text if self._style is None else text.rstrip()
        self._held = text[len(content) :]
        if content:
            self._parts.append(Content(content))
            self._has_content = True

    def _call(self) -> bool:
        assert self._style is not None
        self._reader = reader(self._style, self.schemas, self._call_count, self._parts.append)
        self._call_count += 1
        self._state = self._read
        return True

    def _read(self) -> bool:
        assert self._reader is not None
        self._reader.emit = self._parts.append
        self._text = self._reader.take(self._text, is_last=self._is_last)
        if not self._reader.is_over:
            return False
        self._state = self._after
        return True

    def _after(self) -> bool:
        assert self._style is not None
        if self._style.between is not None:
            pattern = literal_pattern(self._style.between)
            match = regex.match(pattern, self._text, partial=not self._is_last)
            # White space at its end may still come.
            if match and (match.partial or (match.end() == len(self._text) and not self._is_last)):
                return False
            if match:
                self._text, self._state = self._text[match.end() :], self._call
                return True
        self._state = self._over
        return True

    def _over(self) -> bool:
        self._text = ""
        return False


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of ``text`` with which ``mark`` may begin."""
    sizes = range(min(len(mark), len(text)), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)


def _order(match: Any) -> tuple[int, bool]:
    return match.start(), match.partial


def _starts(style: CallFormat) -> list[Any]:
    """Patterns of where calls begin: the lead (group 1) and the beginning of a core."""
    core = _core_start(style)
    return [
        regex.compile(
            f"({literal_pattern(lead)}){core}" if lead.strip() else rf"{_AT_FRONT}(\s*){core}"
        )
        for lead in style.leads
    ]


def _core_start(style: CallFormat) -> str:
    match style.core:
        case "json":
            keys = [
                style.name_key,
                style.arguments_key,
                style.id_key,
                style.counter_key,
                *style.constants,
            ]
            listed = "|".join(map(regex.escape, filter(None, keys)))
            return rf'\s*\{{\s*"{NAME if not style.name_key else f"(?:{listed})"}"\s*:'
        case "named":
            return rf"{NAME}{mids_pattern(style)}\{{"
    ends = [part.strip() for part in (style.close, style.between or "", style.tail)]
    after = "|".join(literal_pattern(part) for part in ends if part) or NOTHING
    empty = literal_pattern(style.empty) if style.empty.strip() else NOTHING
    return rf"{NAME}(?:{literal_pattern(style.open)}|{empty}|\s*(?:{after}))"
