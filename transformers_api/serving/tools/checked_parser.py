"""Reads answers whose calls no grammar has held: they count only if they are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from transformers_api.serving.constraints.compiler import fits
from transformers_api.serving.tools.call_parser import AnswerParser
from transformers_api.serving.tools.call_readers import MARKS
from transformers_api.serving.tools.spec import CallArguments, CallStart, Content, Part


class CheckedParser(AnswerParser):
    """Keeps calls back to the end; where one names no tool or does not fit, all are content."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._raw = ""
        self._call_parts: list[Part] = []  # calls so far

    def push(self, piece: str) -> list[Part]:
        """See AnswerParser."""
        self._raw += piece
        parts = super().push(piece)
        self._call_parts += [part for part in parts if isinstance(part, CallStart | CallArguments)]
        return [part for part in parts if not isinstance(part, CallStart | CallArguments)]

    def finish(self) -> list[Part]:
        """See AnswerParser."""
        parts = super().finish()
        if not self._call_count:
            return parts
        if self._are_right():
            return [*parts, *self._call_parts]
        self.calls = 0
        text = self._held + MARKS.sub("", self._raw[self.call_starts_at :])
        return [*parts, Content(text if self._has_content else text.lstrip())]

    def _are_right(self) -> bool:
        names = [part.name for part in self._call_parts if isinstance(part, CallStart)]
        texts = [""] * len(names)
        for part in self._call_parts:
            if isinstance(part, CallArguments):
                texts[part.index] += part.text
        return len(names) == self._call_count and all(map(self._is_right, names, texts))

    def _is_right(self, name: str, text: str) -> bool:
        schema = self.schemas.get(name)
        try:
            arguments = orjson.loads(text)
        except ValueError:
            return False
        if schema is None or not isinstance(arguments, dict):
            return False
        return fits(orjson.dumps(schema).decode(), _in_order(arguments, schema))


def _in_order(value: Any, schema: Any) -> Any:
    """``value`` with its properties in the order of ``schema``, the only one that is enforced."""
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, list):
        return [_in_order(item, schema.get("items")) for item in value]
    properties = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(properties, Mapping):
        return value
    names = [name for name in properties if name in value]
    names += [name for name in value if name not in properties]
    return {name: _in_order(value[name], properties.get(name)) for name in names}
