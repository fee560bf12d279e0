"""The field of positions in a text, as edits and grids take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields

from transformers_api.api.http.fields import NOT_GIVEN
from transformers_api.serving.inspect.edit_positions import At as Positions
from transformers_api.serving.inspect.edit_positions import SpanAt, StepsAt, TextAt

MOST_NAMED = 1 << 16  # layers, heads, neurons, positions
_WORDS = ("all", "prompt", "generated", "last")


def whole_numbers(value: Any, message: str, most: int = MOST_NAMED) -> tuple[int, ...]:
    """Whole numbers, each once. Raises ValidationError; ``message``: for what is no such list."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValidationError(message)
    if not value:
        raise ValidationError("must not be empty")
    if len(value) > most:
        raise ValidationError(f"must have at most {most} items")
    return tuple(dict.fromkeys(value))


class At(fields.Field[Positions]):
    """Positions: a word, a list, a message's role, a text, or steps."""

    def __init__(self, may_be_empty: bool = False, **options: Any) -> None:
        self.may_be_empty = may_be_empty
        super().__init__(error_messages=NOT_GIVEN, **options)

    EXPECTED = (
        'must be "all", "prompt", "generated", "last", a list of integers, {"span": role}, '
        '{"text": text, "nth": n} or {"steps": [start, stop]}'
    )

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Positions:
        if value in _WORDS:
            words: Positions = value
            return words
        if isinstance(value, list):
            if self.may_be_empty and not value:
                return ()
            return whole_numbers(value, self.EXPECTED)
        if not isinstance(value, dict):
            raise ValidationError(self.EXPECTED)
        match value:
            case {"span": str(role), **rest} if not rest:
                return SpanAt(role)
            case {"text": str(text), **rest} if text and set(rest) <= {"nth"}:
                nth = rest.get("nth", 0)
                if type(nth) is int and 0 <= nth < MOST_NAMED:
                    return TextAt(text, nth)
            case {"steps": [int(start), int(stop)], **rest} if not rest:
                if type(start) is type(stop) is int and 0 <= start < stop < 1 << 31:
                    return StepsAt(start, stop)
        raise ValidationError(self.EXPECTED)
