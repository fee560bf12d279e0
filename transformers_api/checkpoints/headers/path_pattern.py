"""Regular expressions of files from elsewhere, matched with paths of layers in bounded time.

``re`` backtracks: a pattern such as ``.?.?.?.?x`` may take years, and all threads wait for it. Here
all positions that a part can reach are found at once, as the bits of one integer.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any

MAX_PATTERN, MAX_PATH = 500, 500  # characters
MAX_NESTED = 2  # repetitions of groups inside each other
_sre: Any = importlib.import_module("re._parser")
_CATEGORIES = {
    f"CATEGORY_{name}": re.compile(text)
    for name, text in {
        "DIGIT": r"\d",
        "NOT_DIGIT": r"\D",
        "SPACE": r"\s",
        "NOT_SPACE": r"\S",
        "WORD": r"\w",
        "NOT_WORD": r"\W",
    }.items()
}
_ANCHORS = {
    "AT_BEGINNING": re.compile(r"\A"),
    "AT_BEGINNING_STRING": re.compile(r"\A"),
    "AT_END": re.compile(r"\Z"),
    "AT_END_STRING": re.compile(r"\Z"),
    "AT_BOUNDARY": re.compile(r"\b"),
    "AT_NON_BOUNDARY": re.compile(r"\B"),
}
_ONE_CHARACTER = ("ANY", "IN", "LITERAL", "NOT_LITERAL")


class PathPattern:
    """One pattern: what ``re`` has but flags, references, conditions and looks around.

    Raises ValueError for another one.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_PATTERN:
            raise ValueError(f"more than {MAX_PATTERN} characters")
        try:
            parsed = _sre.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None
        if parsed.state.flags != re.UNICODE.value:
            raise ValueError("flags are not read")
        self._nodes = list(parsed)
        self._width: tuple[int, int] = parsed.getwidth()
        _check(self._nodes, 0)

    def is_whole(self, path: str) -> bool:
        """True where the pattern is all of ``path``."""
        return bool(self._reached(path, 1) >> len(path))

    def is_start(self, path: str) -> bool:
        """True where ``path`` begins with it."""
        return bool(self._reached(path, 1))

    def is_end(self, path: str) -> bool:
        """True where it is all of ``path``, or what follows one of its dots."""
        least, most = len(path) - self._width[1], len(path) - self._width[0]
        starts = [0, *(at + 1 for at, c in enumerate(path) if c == ".")]
        bits = reduce(or_, (1 << start for start in starts if least <= start <= most), 0)
        return bool(bits and self._reached(path, bits) >> len(path))

    def ends(self, path: str, start: int) -> Iterator[int]:
        """The ends of matches that begin at ``start``; the longest first."""
        reached = self._reached(path, 1 << start)
        return (at for at in range(len(path), start - 1, -1) if reached >> at & 1)

    def _reached(self, path: str, starts: int) -> int:
        return _Match(path).sequence(self._nodes, starts) if len(path) <= MAX_PATH else 0


def _check(nodes: Any, depth: int) -> None:
    """Raise ValueError for what is not matched here. ``depth``: of repeated groups."""
    for kind, value in nodes:
        name = str(kind)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            is_group = len(value[2]) != 1 or str(value[2][0][0]) not in _ONE_CHARACTER
            if depth + is_group > MAX_NESTED:
                raise ValueError(f"more than {MAX_NESTED} repetitions inside each other")
            _check(value[2], depth + is_group)
        elif name == "BRANCH":
            for each in value[1]:
                _check(each, depth)
        elif name == "SUBPATTERN" and not (value[1] or value[2]):
            _check(value[3], depth)
        elif name not in (*_ONE_CHARACTER, "AT"):
            raise ValueError(f"{name.lower()} is not read")


class _Match:
    """One path. Bit n of a set of positions: before its character n."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._masks: dict[int, int] = {}

    def sequence(self, nodes: Any, starts: int) -> int:
        for node in nodes:
            if not starts:
                break
            starts = self._node(node, starts)
        return starts

    def _node(self, node: Any, starts: int) -> int:
        kind, value = str(node[0]), node[1]
        if kind == "BRANCH":
            return reduce(or_, (self.sequence(each, starts) for each in value[1]), 0)
        if kind == "SUBPATTERN":
            return self.sequence(value[3], starts)
        if kind.endswith("_REPEAT"):
            least, most, nodes = value
            return self._repeated(int(least), int(most), nodes, starts)
        if kind == "AT":
            return starts & self._mask(node)
        return (starts & self._mask(node)) << 1

    def _repeated(self, least: int, most: int, nodes: Any, starts: int) -> int:
        """Positions after ``least`` to ``most`` times; a round without new ones is the last."""
        for _ in range(least):
            before, starts = starts, self.sequence(nodes, starts)
            if starts in (0, before):
                break
        reached = fresh = starts
        for _ in range(most - least):
            fresh = self.sequence(nodes, fresh) & ~reached
            if not fresh:
                break
            reached |= fresh
        return reached

    def _mask(self, node: Any) -> int:
        """Positions where an anchor holds, or before characters that a node of one allows."""
        if id(node) not in self._masks:
            kind, value = str(node[0]), node[1]
            if kind == "AT":
                anchor = _ANCHORS[str(value)]
                at = (n for n in range(len(self.path) + 1) if anchor.match(self.path, n))
            else:
                at = (n for n, c in enumerate(self.path) if _allows(kind, value, c))
            self._masks[id(node)] = reduce(or_, (1 << n for n in at), 0)
        return self._masks[id(node)]


def _allows(kind: str, value: Any, character: str) -> bool:
    code = ord(character)
    if kind == "ANY":
        return character != "\n"
    if kind == "LITERAL":
        return bool(code == value)
    if kind == "NOT_LITERAL":
        return bool(code != value)
    if kind == "RANGE":
        return bool(value[0] <= code <= value[1])
    if kind == "CATEGORY":
        return _CATEGORIES[str(value)].match(character) is not None
    is_negated = bool(value) and str(value[0][0]) == "NEGATE"
    return is_negated != any(_allows(str(k), v, character) for k, v in value[is_negated:])
