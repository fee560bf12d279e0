"""JSON that means one thing: no NaN, duplicate keys, half surrogate pairs or endless nesting."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import orjson
from flask.json.provider import JSONProvider

from transformers_api.errors import InvalidRequest

OPTIONS = orjson.OPT_NON_STR_KEYS
MAX_DEPTH = 64
MAX_INTEGER_DIGITS = 19  # beyond 64 bits no field has a meaning, and parsing costs its square

# A string counts as one piece even where it does not end, so that the scan stays linear.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(raw: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    Raises InvalidRequest that says what is wrong with it.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 (byte {error.start})") from None
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
    if _SURROGATE_ESCAPE.search(text) and _has_lone_surrogate(value):
        raise InvalidRequest("The body is not valid JSON: a string holds half a surrogate pair")
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidRequest(f"The body is nested more than {MAX_DEPTH} levels deep")
        elif first in "]}":
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


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise InvalidRequest("The body holds an integer of more than 64 bits")
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise InvalidRequest("The body holds an integer of more than 64 bits")
    return value


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
        """Parse strictly; raises InvalidRequest."""
        return parse(s.encode("utf-8", "surrogatepass") if isinstance(s, str) else s)
