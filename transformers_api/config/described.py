"""The settings as documents and ``check`` show them."""

from __future__ import annotations

from dataclasses import MISSING, fields

from transformers_api.config.settings import Settings


def described() -> list[tuple[str, str, str, str]]:
    """(NAME, default, aliases, help) of every setting, for documents and ``check``."""
    rows = []
    for option in fields(Settings):
        default = "" if option.default is MISSING else option.default
        if default in (None, ()):
            default = ""
        text = str(default).lower() if isinstance(default, bool) else str(default)
        aliases = ", ".join(option.metadata["aliases"])
        rows.append((option.name.upper(), text, aliases, option.metadata["help"]))
    return rows
