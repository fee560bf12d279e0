"""Marshmallow fields that take what they say and nothing that merely resembles it.

No "5" for 5, no 5.0 for 5, no true for 1. Messages are predicates ("must be …"), which the parser
puts behind the name of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from marshmallow import Schema as BaseSchema
from marshmallow import ValidationError, fields, pre_load, validate
from marshmallow.constants import EXCLUDE

from transformers_api.api.http.strict_json import MOST_ITEMS

LONGEST_NAME = 64  # of an unknown field, as it is said
MAX_TOKEN_ID = (1 << 31) - 1
MOST_IDS = 1 << 18  # of one body
NOT_GIVEN: dict[str, Any] = {"required": "is required", "null": "must not be null"}


class Refusal(str):
    """A validation message that becomes UnsupportedParameter instead of InvalidRequest."""

    __slots__ = ()


class Schema(BaseSchema):
    """A JSON object of a request: null means default, unknown names are ignored."""

    most_items: int = MOST_ITEMS  # of a body, in all its lists and objects

    error_messages: dict[str, str] = {  # noqa: RUF012 - marshmallow declares it so
        "type": "must be an object",
        "unknown": "is unknown",
    }

    class Meta:
        """Options of marshmallow."""

        unknown = EXCLUDE

    @pre_load
    def drop_nulls(self, data: Any, **_: Any) -> Any:
        """Null is how several SDKs write that an option was left alone."""
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


class StrictSchema(Schema):
    """An object of our own, whose unknown names are mistakes: nobody else's clients send it."""

    @pre_load
    def refuse_unknown(self, data: Any, **_: Any) -> Any:
        """Name the field that was probably meant, or all there are."""
        if not isinstance(data, Mapping):
            return data
        names = [field.data_key or name for name, field in self.fields.items()]
        for name in data:
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}"
                raise ValidationError({name[:LONGEST_NAME]: [f"is unknown; {hint}"]})
        return data


def _number(value: float) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"


class Integer(fields.Integer):
    """A whole number from ``low`` to ``high``."""

    def __init__(self, low: int, high: int, **options: Any) -> None:
        self.message = f"must be an integer from {_number(low)} to {_number(high)}"
        if (low, high) == (-(2**63), 2**63 - 1):  # as many as JSON may have here
            self.message = "must be an integer"
        bounds = validate.Range(low, high, error=self.message)
        super().__init__(validate=bounds, error_messages=NOT_GIVEN, **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> int:
        if type(value) is not int:
            raise ValidationError(self.message)
        return value


class Number(fields.Float):
    """A number from ``low`` to ``high``; ``above`` excludes ``low`` itself."""

    def __init__(self, low: float, high: float, *, above: bool = False, **options: Any) -> None:
        start = "above" if above else "from"
        self.message = f"must be a number {start} {_number(low)} to {_number(high)}"
        bounds = validate.Range(low, high, min_inclusive=not above, error=self.message)
        super().__init__(validate=bounds, error_messages=NOT_GIVEN, **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> float:
        if type(value) not in (int, float):
            raise ValidationError(self.message)
        return float(value)


class Boolean(fields.Boolean):
    """true or false."""

    def __init__(self, **options: Any) -> None:
        super().__init__(error_messages=NOT_GIVEN, **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> bool:
        if type(value) is not bool:
            raise ValidationError("must be true or false")
        return value


class Text(fields.String):
    """A string of ``shortest`` to ``longest`` characters, one of ``choices``, or like ``pattern``.

    ``pattern`` has to be a pattern of ours: it runs in Python's own engine.
    """

    def __init__(
        self,
        *,
        shortest: int = 0,
        longest: int | None = None,
        choices: tuple[str, ...] = (),
        pattern: str | None = None,
        **options: Any,
    ) -> None:
        checks: list[Any] = []
        if pattern is not None:
            whole = rf"^(?:{pattern})(?![\s\S])"  # no \Z: the document's readers are JavaScript
            checks.append(validate.Regexp(whole, error=f"must be like {pattern}"))
        if choices:
            listed = ", ".join(f"'{choice}'" for choice in choices)
            checks.append(validate.OneOf(choices, error=f"must be one of {listed}"))
        elif shortest or longest is not None:
            size = f"from {shortest} to {_number(longest)}" if longest else f"at least {shortest}"
            error = f"must have {size} characters"
            checks.append(validate.Length(shortest or None, longest, error=error))
        super().__init__(validate=checks, error_messages=NOT_GIVEN, **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> str:
        if not isinstance(value, str):
            raise ValidationError("must be a string")
        return value


class Many(fields.List[Any]):
    """A list of ``shortest`` to ``longest`` items."""

    def __init__(
        self, item: fields.Field[Any], *, shortest: int = 0, longest: int, **options: Any
    ) -> None:
        error = f"must have from {shortest} to {_number(longest)} items"
        messages = NOT_GIVEN | {"invalid": "must be a list"}
        super().__init__(
            item,
            validate=validate.Length(shortest, longest, error=error),
            error_messages=messages,
            **options,
        )

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        # A tuple or a set cannot come out of JSON; marshmallow takes any collection.
        if not isinstance(value, list):
            raise ValidationError("must be a list")
        for check in self.validators:  # before the items, which may be many
            check(value)
        return [self._item(index, item, **kwargs) for index, item in enumerate(value)]

    def _item(self, index: int, item: Any, **kwargs: Any) -> Any:
        """Load one item. The first bad one ends it: only one message is sent."""
        try:
            return self.inner.deserialize(item, **kwargs)
        except ValidationError as error:
            raise ValidationError({index: error.messages}) from None


class TokenIds(Many):
    """Token ids of any model; checked all at once, for they may be many."""

    def __init__(self, *, shortest: int = 0, **options: Any) -> None:
        self.one = Integer(0, MAX_TOKEN_ID)
        super().__init__(self.one, shortest=shortest, longest=MOST_IDS, **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValidationError("must be a list")
        for check in self.validators:
            check(value)
        check_ids(value, self.one.message)
        return value


def check_ids(ids: list[Any], message: str = "must be a token id") -> None:
    """Raise ValidationError at the first of ``ids`` that no model could have."""
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) <= MAX_TOKEN_ID)):
        return
    for index, item in enumerate(ids):
        if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID:
            raise ValidationError({index: [message]})


class Object(fields.Nested):
    """An object with a schema of its own."""

    def __init__(self, schema: type[Schema], **options: Any) -> None:
        messages = NOT_GIVEN | {"type": "must be an object"}
        super().__init__(schema, error_messages=messages, **options)

    def _load(self, value: Any, partial: Any = None) -> Any:
        try:
            return self.schema.load(value, unknown=self.unknown, partial=partial)
        except ValidationError as error:
            # The frame that raised it knows it: a circle around the whole value.
            error.__traceback__ = None
            raise ValidationError(error.messages) from None


class AnyObject(fields.Dict):
    """An object with any names, not deeper than JSON may be."""

    def __init__(self, **options: Any) -> None:
        messages = NOT_GIVEN | {"invalid": "must be an object"}
        super().__init__(error_messages=messages, **options)


class OneOrMany(fields.Field[list[Any]]):
    """One item, or a list of them; always a list afterwards."""

    def __init__(self, item: fields.Field[Any], *, longest: int, **options: Any) -> None:
        self.item = item
        self.many = Many(item, longest=longest)
        super().__init__(error_messages=NOT_GIVEN, **options)

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> list[Any]:
        if isinstance(value, list):
            loaded: list[Any] = self.many.deserialize(value, attr, data, **kwargs)
            return loaded
        return [self.item.deserialize(value, attr, data, **kwargs)]


class Unsupported(fields.Field[Any]):
    """A known field that is refused unless its value asks for nothing."""

    def __init__(self, neutral: Callable[[Any], bool] | None = None, **options: Any) -> None:
        self.neutral = neutral or _asks_nothing
        options.setdefault("metadata", {"description": "Not supported: refused by name."})
        super().__init__(error_messages=NOT_GIVEN, **options)

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> Any:
        if self.neutral(value):
            return value
        raise ValidationError(Refusal("is not supported by this server"))


def _asks_nothing(value: Any) -> bool:
    return value is False or value in ("", [], {})


class OutsideOnly(Schema):
    """A body of a route that neither shows the model's inside nor changes it."""

    trace = Unsupported()
    intervene = Unsupported()
    branch = Unsupported()
