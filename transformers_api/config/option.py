"""A field of Settings: its default, its parser, its words for the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any


def setting(
    default: Any,
    parse: Callable[[str], Any],
    help_: str,
    *,
    aliases: tuple[str, ...] = (),
    is_secret: bool = False,
) -> Any:
    """A field with this help; a default that is called is one of this machine."""
    metadata = {"parse": parse, "help": help_, "aliases": aliases}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata, repr=not is_secret)
