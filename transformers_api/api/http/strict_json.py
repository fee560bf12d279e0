"""JSON that means one thing: no NaN, duplicate keys, half surrogate pairs or endless nesting.

A scan in C bounds what parsing may build before anything is built: two megabytes of ``{"a":1}``
would be fifty of objects, and a third of a second of the interpreter.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import orjson
from flask.json.provider import JSONProvider

from transformers_api.errors import InvalidRequest, PayloadTooLarge

OPTIONS = orjson.OPT_NON_STR_KEYS
MAX_DEPTH = 64
MAX_DIGITS = 64  # of a number; beyond, parsing costs their square

MOST_PARTS = 1 << 15  # lists, objects, names, strings, and twice the numbers that are no integers
MOST_ITEMS = 1 << 15  # what commas separate; more where a route takes token ids

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 19  # as many digits as the largest integer of 64 bits has
_ZEROS = re.compile(rb"0+")
_FRACTION = re.compile(rb"[.eE][-+]?$")  # what comes before digits that are no integer


def parse(raw: bytes, most_items: int | None = MOST_ITEMS) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    Raises InvalidRequest that says what is wrong with it, PayloadTooLarge for more than
    ``most_items`` or MOST_PARTS. None: it may be as large as it likes.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 (byte {error.start})") from None
    most_parts = len(raw) if most_items is None else MOST_PARTS
    structure = _structure(raw, most_parts)
    has_exponents = _check_size(
        structure, len(raw) if most_items is None else most_items, most_parts
    )
    _check_digits(structure, most_parts)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            # The parser's own, which is five times as fast, where no number can be too large.
            parse_float=_finite if has_exponents else None,
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
    if b"\\u" in raw and _SURROGATE_ESCAPE.search(text) and _has_lone_surrogate(value):
        raise InvalidRequest("The body is not valid JSON: a string holds half a surrogate pair")
    return value


def _structure(raw: bytes, most_parts: int) -> bytes:
    """``raw`` without what stands in strings. Raises PayloadTooLarge for too many of them."""
    if b"\\" in raw:  # pairs from the left, as escapes are read
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if raw.count(b'"') > 2 * most_parts:
        raise _too_much("strings", most_parts)
    return b'""'.join(raw.split(b'"')[::2])


def _check_size(structure: bytes, most_items: int, most_parts: int) -> bool:
    """Raise for nesting or numbers of parts beyond the limits. True: a number has an exponent."""
    brackets = structure.translate(None, _NO_BRACKETS)
    _check_depth(brackets[: 2 * most_parts])
    words = structure.count(b"true") + structure.count(b"false")
    exponents = max(structure.count(b"e") - words, 0) + structure.count(b"E")
    opened = brackets.count(b"[") + brackets.count(b"{")
    strings = structure.count(b'"') // 2
    fractions = structure.count(b".")
    if opened + strings + 2 * (fractions + exponents) > most_parts:
        raise _too_much("lists, objects, names, strings and fractions", most_parts)
    if structure.count(b",") > most_items:
        raise _too_much("items", most_items)
    return exponents > 0


def _check_digits(structure: bytes, most_parts: int) -> None:
    """Raise for integers of more than 64 bits, and for what has too many digits."""
    zeros = structure.translate(_DIGITS)
    if zeros.count(_LONG) > most_parts // 2:
        raise _too_much("long numbers", most_parts // 2)
    start = zeros.find(_LONG)
    while start >= 0:
        run = _ZEROS.match(zeros, start)
        assert run is not None
        end = run.end()
        before, after = structure[max(start - 2, 0) : start], structure[end : end + 1]
        _check_number(before, structure[start:end], after)
        start = zeros.find(_LONG, end)


def _check_number(before: bytes, digits: bytes, after: bytes) -> None:
    """``before``: the two characters before its digits, ``after``: the one behind them."""
    if _FRACTION.search(before) or after in (b".", b"e", b"E"):
        if len(digits) > MAX_DIGITS:
            raise InvalidRequest(f"The body holds a number of more than {MAX_DIGITS} digits")
    elif len(digits) > len(_LONG) or int(digits) >= 2**63 + before.endswith(b"-"):
        raise InvalidRequest("The body holds an integer of more than 64 bits")


def _too_much(parts: str, most: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body has more than {most} {parts}")


def _check_depth(brackets: bytes) -> None:
    depth = 0
    for bracket in brackets:
        if bracket in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidRequest(f"The body is nested more than {MAX_DEPTH} levels deep")
        else:
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names: set[str] = set()
        for key, _ in pairs:
            if key in names:
                # A name with half a surrogate pair could not be sent back.
                name = key.encode("utf-8", "replace").decode()
                raise InvalidRequest(f"The body names '{name[:64]}' twice in one object")
            names.add(key)
    return value


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {name} is not a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise InvalidRequest("The body holds a number that is too large")
    return value


def _has_lone_surrogate(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:  # orjson writes UTF-8, which has no place for them
        return True
    return False


def dump(value: Any) -> bytes:
    """``value`` as compact JSON in UTF-8."""
    return orjson.dumps(value, option=OPTIONS)


def ready(text: bytes) -> Any:
    """JSON that is written already, to stand as a value in what ``dump`` writes."""
    return orjson.Fragment(text)


class StrictJSONProvider(JSONProvider):
    """Flask's JSON, in and out, through ``parse`` and ``dump``."""

    def dumps(self, obj: Any, **options: Any) -> str:
        """JSON text; ``indent`` and ``sort_keys`` are known."""
        option = OPTIONS
        if options.get("indent"):
            option |= orjson.OPT_INDENT_2
        if options.get("sort_keys"):
            option |= orjson.OPT_SORT_KEYS
        return orjson.dumps(obj, option=option).decode()

    def loads(self, s: str | bytes, **_options: Any) -> Any:
        """Parse strictly; raises InvalidRequest. Bodies of requests are read in ``body.py``."""
        return parse(s.encode("utf-8", "surrogatepass") if isinstance(s, str) else s, None)
