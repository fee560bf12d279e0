"""Readers of one call, one for each kind of core: the name, and the arguments as they come."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import orjson
import regex

from transformers_api.serving.tools.call_format import (
    SLOT_COUNT,
    SLOT_ID,
    SLOT_NAME,
    CallFormat,
)
from transformers_api.serving.tools.call_grammar import is_text
from transformers_api.serving.tools.spec import CallArguments, CallStart, Part

NAME = r"([A-Za-z0-9_.\-]{1,64}?)"
NOTHING = "(?!)"
MARKS = regex.compile("[\udc00-\udfff]")  # special tokens outside of the format
_PARTS = regex.compile(rf"(\s+|{SLOT_ID}|{SLOT_NAME}|{SLOT_COUNT})")


def literal_pattern(text: str) -> str:
    """A pattern for a literal of a format: white space in it may be any, numbers other ones."""
    pattern = ""
    for part in filter(None, _PARTS.split(text)):
        if part == SLOT_ID:
            pattern += r"[A-Za-z0-9_\-.:]*?"
        elif part == SLOT_NAME:
            pattern += r"[A-Za-z0-9_.\-]+?"
        elif part == SLOT_COUNT:
            pattern += r"\d+"
        elif part.isspace():
            pattern += r"\s*"
        else:
            pattern += regex.sub(r"\d+", r"\\d+", regex.escape(part))
    return pattern


def mids_pattern(style: CallFormat) -> str:
    """A pattern for what may stand between a name and its arguments."""
    return f"(?:{'|'.join(map(literal_pattern, (style.mid, *style.other_mids)))})"


class CallReader:
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
        """Read what is clear; return the rest of ``text``, to be given again with more."""
        raise NotImplementedError

    def begin(self, name: str) -> None:
        """The call of a function begins."""
        self.name = name
        self.emit(CallStart(self.index, name))

    def write(self, text: str) -> None:
        """The next piece of its arguments."""
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


class _ObjectReader(CallReader):
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
            self._waiting = _string(text) if self._first == '"' else text
        elif self._key == self.style.name_key and self.name is None:
            self.begin(_string(text))
        if self.name is not None and self._waiting:
            self.write(self._waiting)
            self._waiting = ""


class _NamedReader(CallReader):
    """A name, and its arguments as JSON."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._head = regex.compile(rf"{NAME}{mids_pattern(self.style)}(?=\{{)")
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


class _TaggedReader(CallReader):
    """Arguments between literals, written as JSON on the way."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        style = self.style
        after = [part for part in (style.close, style.between, style.tail) if part]
        ends = "|".join(literal_pattern(part) for part in after) or r"\Z"
        self._value_end = regex.compile(f"(?:{literal_pattern(style.sep)})|(?:{ends})")
        self._open = regex.compile(f"{NAME}({literal_pattern(style.open)})")
        stop = literal_pattern((style.between or "").strip()) or NOTHING
        tail = literal_pattern(style.tail.strip()) or NOTHING
        close = literal_pattern(style.close.strip()) or NOTHING
        self._nothing = regex.compile(f"{stop}|{tail}")
        # White space alone ends no name: that is a bare one.
        is_marked = bool(style.empty.strip())
        empty = regex.compile(rf"{NAME}{literal_pattern(style.empty)}") if is_marked else None
        bare = regex.compile(rf"{NAME}\s*(?={close}|{stop}|{tail})")
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
        is_empty = pattern is not self._open
        if not is_empty and self.style.empty == self.style.open:
            rest = self._text[match.end() :]
            end = self._nothing.match(rest, partial=not self._is_last)
            if (end and end.partial) or (not rest and not self._is_last):
                return False
            is_empty = end is not None
        self.begin(match[1])
        self._text = self._text[match.end() :]
        if is_empty:
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
) -> CallReader:
    """The reader of the ``index``-th call of an answer."""
    kinds = {"json": _ObjectReader, "named": _NamedReader, "tagged": _TaggedReader}
    return kinds[style.core](style, schemas, index, emit)


def _string(text: str) -> str:
    """The text of a JSON string, or as it is: a model that nothing holds may write no JSON."""
    try:
        return str(orjson.loads(text))
    except ValueError:
        return text.strip()


def _escaped(text: str) -> str:
    return orjson.dumps(MARKS.sub("", text)).decode()[1:-1]


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
