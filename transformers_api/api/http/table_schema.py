"""Bodies whose fields stand in the table: aliases are renamed, what is not supported is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, pre_load

from transformers_api.api.http.field_table import Entry, Treatment
from transformers_api.api.http.fields import Refusal, Schema


class TableSchema(Schema):
    """A body of the route whose ``entries`` it has."""

    entries: Mapping[str, Entry]

    @pre_load
    def drop_nulls(self, data: Any, **_: Any) -> Any:
        """Only what the schema declares is left, and what is in no table."""
        data = super().drop_nulls(data)
        if not isinstance(data, Mapping):
            return data
        fields = dict(data)
        for name, value in data.items():
            entry = self.entries.get(name)
            if entry is None or entry.treatment is Treatment.SUPPORTED:
                continue
            del fields[name]
            if entry.treatment is Treatment.REFUSED:
                _refuse(entry, value)
            elif entry.treatment is Treatment.ALIAS:
                _rename(entry, value, fields)
        return fields

    def handle_error(self, error: ValidationError, data: Any, **_: Any) -> None:
        """Errors name the field that the client sent, not what it stands for."""
        if not isinstance(data, Mapping) or not isinstance(error.messages, dict):
            return
        sent = {
            entry.of: name
            for name in data
            if (entry := self.entries.get(name)) is not None
            and entry.treatment is Treatment.ALIAS
            and data.get(entry.of) is None
        }
        if sent:
            error.messages = {sent.get(key, key): text for key, text in error.messages.items()}


def _rename(entry: Entry, value: Any, fields: dict[str, Any]) -> None:
    """Raise ValidationError where the field that it stands for has another value."""
    if fields.setdefault(entry.of, value) != value:
        text = f"must not differ from '{entry.of}', for which it stands"
        raise ValidationError({entry.name: [text]})


def _refuse(entry: Entry, value: Any) -> None:
    """Raise ValidationError unless ``value`` asks for nothing."""
    if value not in entry.neutral:
        hint = f"; see '{entry.of}'" if entry.of else ""
        raise ValidationError({entry.name: [Refusal(f"is not supported by this server{hint}")]})
