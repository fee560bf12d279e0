"""What a model writes, piece by piece, to parts: what it thinks, what it says, what it calls.

One state machine for all formats. A piece is held back only while it may be the beginning of a
literal of the format; how the text is cut into pieces never changes the parts, but where they are
cut.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import orjson
import regex

from transformers_api.serving.tools.call_format import SLOT_ID, SLOT_NAME, CallFormat
from transformers_api.serving.tools.call_grammar import is_text
from transformers_api.serving.tools.spec import (
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
)

NAME = r"([A-Za-z0-9_.\-]{1,64}?)"
_PARTS = regex.compile(rf"(\s+|{SLOT_ID}|{SLOT_NAME})")
_NOTHING = "(?!)"
_MARKS = regex.compile("[\udc00-\udfff]")  # special tokens outside of the format


def literal_pattern(text: str) -> str:
    """A pattern for a literal of a format: white space in it may be any, numbers other ones."""
    pattern = ""
    for part in filter(None, _PARTS.split(text)):
        if part == SLOT_ID:
            pattern += r"[A-Za-z0-9_\-.:]*?"
        elif part == SLOT_NAME:
            pattern += r"[A-Za-z0-9_.\-]+?"
        elif part.isspace():
            pattern += r"\s*"
        else:
            pattern += regex.sub(r"\d+", r"\\d+", regex.escape(part))
    return pattern


class AnswerParser:
    """Reads one answer. ``schemas`` are the parameters of the tools, by name.

    ``style`` None: there are no calls. ``thought`` are the marks around reasoning, None where there
    is none; ``is_thinking``: the prompt has opened it.
    """

    def __init__(
        self,
        style: CallFormat | None,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        thought: tuple[str, str] | None = None,
        is_thinking: bool = False,
    ) -> None:
        self._style = style
        self._schemas = schemas
        self._thought = thought
        self._text = ""
        self._parts: list[Part] = []
        self._is_last = False
        self._state: Callable[[], bool] = self._begin
        self._held = ""  # white space after content
        self._has_content = False
        self._trims = False  # white space before content
        self.calls = 0
        if thought is None:
            self._state = self._content
        elif is_thinking:
            self._state = self._reasoning
        self._starts = [] if style is None else _starts(style)
        self._reader: _CallReader | None = None

    def push(self, piece: str) -> list[Part]:
        """The parts that become clear with the next piece."""
        self._text += piece
        self._parts = []
        while self._state():
            pass
        for part in self._parts:
            if not isinstance(part, CallStart):
                part.text = _MARKS.sub("", part.text)
        return [part for part in self._parts if isinstance(part, CallStart) or part.text]

    def finish(self) -> list[Part]:
        """The rest, at the end of the answer."""
        self._is_last = True
        parts = self.push("")
        if self._held and self._has_content and not self.calls:
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
        self._state = self._content
        return True

    def _reasoning(self) -> bool:
        assert self._thought is not None
        close = self._thought[1]
        before, mark, after = self._text.partition(close)
        if mark:
            self._think(before)
            self._text, self._state, self._trims = after, self._content, True
            return True
        kept = 0 if self._is_last else _overlap(before, close)
        self._think(before[: len(before) - kept])
        self._text = before[len(before) - kept :]
        return False

    def _think(self, text: str) -> None:
        if text:
            self._parts.append(Reasoning(text))

    def _content(self) -> bool:
        first: Any = None
        for pattern in self._starts:
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
        self._text = self._text[first.end(1) :]
        self._state = self._call
        return True

    def _say(self, text: str) -> None:
        text = self._held + text
        if self._trims and not self._has_content:
            text = text.lstrip()
        said = text.rstrip()
        if self._style is None:
            said = text
        self._held = text[len(said) :]
        if said:
            self._parts.append(Content(said))
            self._has_content = True

    def _call(self) -> bool:
        assert self._style is not None
        self._reader = reader(self._style, self._schemas, self.calls, self._parts.append)
        self.calls += 1
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
            if match and match.partial:
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
        regex.compile(f"({literal_pattern(lead)}){core}" if lead.strip() else rf"\A(\s*){core}")
        for lead in style.leads
    ]


def _core_start(style: CallFormat) -> str:
    match style.core:
        case "json":
            keys = [style.name_key, style.arguments_key, style.id_key, *style.constants]
            listed = "|".join(map(regex.escape, filter(None, keys)))
            return rf'\{{\s*"{NAME if not style.name_key else f"(?:{listed})"}"\s*:'
        case "named":
            return rf"{NAME}{literal_pattern(style.mid)}\{{"
    ends = [part.strip() for part in (style.close, style.between or "", style.tail)]
    after = "|".join(literal_pattern(part) for part in ends if part) or _NOTHING
    empty = literal_pattern(style.empty) or _NOTHING
    return rf"{NAME}(?:{literal_pattern(style.open)}|{empty}|\s*(?:{after}))"


class _CallReader:
    """Reads one call; ``take`` gives back what is left of the text."""

    def __init__(
        self,
        style: CallFormat,
        schemas: Mapping[str, Mapping[str, Any]],
        index: int,
        emit: Callable[[Part], None],
    ) -> None:
        self.style = style
        self.schemas = schemas
        self.index = index
        self.emit = emit
        self.is_over = False
        self.name: str | None = None

    def take(self, text: str, *, is_last: bool) -> str:
        raise NotImplementedError

    def begin(self, name: str) -> None:
        self.name = name
        self.emit(CallStart(self.index, name))

    def write(self, text: str) -> None:
        if text:
            self.emit(CallArguments(self.index, text))


class _JsonValue:
    """Follows one value of JSON, character by character."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._is_escaped = False
        self.has_begun = False

    def ends_with(self, character: str) -> bool:
        """True where the value ends with ``character``: a text, an object or a list."""
        self.has_begun = True
        if self._in_text:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_text = False
                return self._depth == 0
        elif character == '"':
            self._in_text = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


_KEY = regex.compile(r'\s*[{,]\s*"((?:[^"\\]|\\.)*)"\s*:\s*')
_END = regex.compile(r"\s*\}")


class _ObjectReader(_CallReader):
    """A core that is one object: the arguments leave as they come."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._key: str | None = None
        self._value = ""
        self._scan = _JsonValue()
        self._first = ""  # character of the value
        self._waiting = ""  # arguments that came before the name

    def take(self, text: str, *, is_last: bool) -> str:
        while True:
            if self._key is None:
                match = _KEY.match(text)
                if match is None or match.end() == len(text):
                    end = _END.match(text)
                    self.is_over = end is not None
                    return text[end.end() :] if end else text
                self._key, self._value, self._scan = match[1], "", _JsonValue()
                self._first = ""
                text = text[match.end() :]
                if not self.style.name_key:
                    self.begin(self._key)
            size = self._size(text)
            if size is None:
                self._partial(text)
                return ""
            self._whole(text[:size])
            text, self._key = text[size:], None

    def _size(self, text: str) -> int | None:
        """Characters up to the end of the value; None: it goes on."""
        for at, character in enumerate(text):
            if not self._scan.has_begun and character not in '"{[':  # a number, true, null
                if character in ",}":
                    return at
            elif self._scan.ends_with(character):
                return at + 1
        return None

    @property
    def _is_arguments(self) -> bool:
        return not self.style.name_key or self._key == self.style.arguments_key

    def _partial(self, text: str) -> None:
        self._first = self._first or text[:1]
        if self._is_arguments and self.name is not None and self._first != '"':
            self.write(text)
        else:
            self._value += text

    def _whole(self, text: str) -> None:
        self._first = self._first or text[:1]
        text = self._value + text
        if self._is_arguments:  # as they are, or as JSON in a string
            self._waiting = orjson.loads(text) if self._first == '"' else text
        elif self._key == self.style.name_key:
            self.begin(str(orjson.loads(text)))
        if self.name is not None and self._waiting:
            self.write(self._waiting)
            self._waiting = ""


class _NamedReader(_CallReader):
    """A name, and its arguments as JSON."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._head = regex.compile(rf"{NAME}{literal_pattern(self.style.mid)}(?=\{{)")
        self._scan = _JsonValue()

    def take(self, text: str, *, is_last: bool) -> str:
        if self.name is None:
            match = self._head.match(text)
            if match is None:
                return text
            self.begin(match[1])
            text = text[match.end() :]
        for at, character in enumerate(text):
            if self._scan.ends_with(character):
                self.write(text[: at + 1])
                self.is_over = True
                return text[at + 1 :]
        self.write(text)
        return ""


class _TaggedReader(_CallReader):
    """Arguments between literals, written as JSON on the way."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        style = self.style
        after = [part for part in (style.close, style.between, style.tail) if part]
        ends = "|".join(literal_pattern(part) for part in after) or r"\Z"
        self._value_end = regex.compile(f"(?:{literal_pattern(style.sep)})|(?:{ends})")
        self._open = regex.compile(f"{NAME}({literal_pattern(style.open)})")
        stop = literal_pattern((style.between or "").strip()) or _NOTHING
        tail = literal_pattern(style.tail.strip()) or _NOTHING
        close = literal_pattern(style.close.strip()) or _NOTHING
        self._nothing = regex.compile(f"{stop}|{tail}")
        empty = regex.compile(rf"{NAME}{literal_pattern(style.empty)}") if style.empty else None
        bare = regex.compile(rf"{NAME}(?=\s*(?:{close}|{stop}|{tail}))")
        # The longer one first: one of them may begin like the other.
        heads = (empty, self._open) if len(style.empty) > len(style.open) else (self._open, empty)
        self._heads = [*filter(None, heads), bare]
        kinds = [f"({literal_pattern(kv)})" for kv in (style.kv, style.kv_json) if kv]
        self._key = regex.compile(rf'([^<>"\n]*?)(?:{"|".join(kinds)})')
        self._sep = regex.compile(literal_pattern(style.sep))
        self._close = regex.compile(literal_pattern(style.close))
        self._step: Callable[[], bool] = self._name
        self._count = 0
        self._is_text = False
        self._text = ""
        self._is_last = False

    def take(self, text: str, *, is_last: bool) -> str:
        self._text, self._is_last = text, is_last
        while not self.is_over and self._step():
            pass
        return self._text

    def _match(self, pattern: Any) -> Any:
        """The match, one that may still become whole, or None."""
        return pattern.match(self._text, partial=not self._is_last)

    def _name(self) -> bool:
        for pattern in self._heads:
            match = self._match(pattern)
            if match is not None and match.partial:
                return False
            if match is not None:
                break
        else:
            return False
        self.begin(match[1])
        self._text = self._text[match.end() :]
        same = pattern is self._open and self.style.empty == self.style.open
        if pattern is not self._open or (same and self._nothing.match(self._text)):
            self.write("{}")
            self.is_over = True
            return False
        self.write("{")
        self._step = self._argument
        return True

    def _argument(self) -> bool:
        match = self._match(self._key)
        if match is None or match.partial or (match.end() == len(self._text) and not self._is_last):
            return False
        key = match[1].strip()
        schema = self.schemas.get(self.name or "", {}).get("properties", {}).get(key, {})
        is_json = bool(self.style.kv_json and match.lastindex and match.lastindex >= 3)
        bare = not self.style.quotes[0]
        self._is_text = bare and (is_text(schema) or bool(self.style.kv_json and not is_json))
        self.write((", " if self._count else "") + orjson.dumps(key).decode() + ": ")
        self._count += 1
        self._text = self._text[match.end() :]
        if self._is_text:
            self.write('"')
        self._step = self._value if bare else self._quoted
        return True

    def _value(self) -> bool:
        match: Any = self._value_end.search(self._text, partial=not self._is_last)
        whole = match is not None and not match.partial
        if self._is_text:
            cut = match.start() if match is not None else len(self._text)
            self.write(_escaped(self._text[:cut]) + ('"' if whole else ""))
            self._text = self._text[cut:]
        elif whole:
            self.write(orjson.dumps(_literal(self._text[: match.start()])).decode())
            self._text = self._text[match.start() :]
        if whole:
            self._step = self._between
        return whole

    def _quoted(self) -> bool:
        try:
            value, end = _notation(self._text, 0, self.style.quotes)
        except (ValueError, IndexError):
            return False
        if end >= len(self._text) and not self._is_last:
            return False
        self.write(orjson.dumps(value).decode())
        self._text, self._step = self._text[end:], self._between
        return True

    def _between(self) -> bool:
        match = self._match(self._sep)
        if match is not None and match.partial:
            return False
        if match is not None:
            self._text, self._step = self._text[match.end() :], self._argument
            return True
        if self.style.close:
            match = self._match(self._close)
            if match is not None and match.partial:
                return False
            if match is not None:
                self._text = self._text[match.end() :]
        self.write("}")
        self.is_over = True
        return False


def reader(
    style: CallFormat,
    schemas: Mapping[str, Mapping[str, Any]],
    index: int,
    emit: Callable[[Part], None],
) -> _CallReader:
    """What reads the ``index``-th call of an answer."""
    kinds = {"json": _ObjectReader, "named": _NamedReader, "tagged": _TaggedReader}
    return kinds[style.core](style, schemas, index, emit)


def _escaped(text: str) -> str:
    return orjson.dumps(_MARKS.sub("", text)).decode()[1:-1]


def _literal(text: str) -> Any:
    """A value as JSON or Python writes it; else the text itself."""
    text = text.strip()
    for read in (orjson.loads, ast.literal_eval):
        try:
            value = read(text)
            orjson.dumps(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return value
    return text


def _notation(text: str, at: int, quotes: tuple[str, str]) -> tuple[Any, int]:
    """A value in JSON, or with quotes of its own and keys without any: (value, its end)."""
    before, after = quotes
    if text[at] in "[{":
        with suppress(ValueError):
            return json.JSONDecoder().raw_decode(text, at)
    if text.startswith(before, at):
        end = text.index(after, at + len(before))
        return text[at + len(before) : end], end + len(after)
    if text[at] == "[":
        items, at = [], at + 1
        while text[at] != "]":
            item, at = _notation(text, at, quotes)
            items.append(item)
            at += text[at] == ","
        return items, at + 1
    if text[at] == "{":
        fields, at = {}, at + 1
        while text[at] != "}":
            if text.startswith(before, at):
                key, at = _notation(text, at, quotes)
                at += 1
            else:
                end = text.index(":", at)
                key, at = text[at:end], end + 1
            fields[str(key)], at = _notation(text, at, quotes)
            at += text[at] == ","
        return fields, at + 1
    match = regex.match(r"[^,\]}]+", text, pos=at) or regex.compile(r"[^,\]}]+").match(text, at)
    if match is None:
        raise ValueError(text)
    return _literal(match[0]), match.end()
