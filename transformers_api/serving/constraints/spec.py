"""The form that a client wants an answer to have. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "rules" are our own, in Lark; "lark" is what a client sent.
Kind = Literal["json_schema", "regex", "lark", "tags", "rules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintSpec:
    """A grammar in the words of ``kind``, checked for size; ``param`` is the field it came in."""

    kind: Kind
    source: str  # a JSON schema as JSON, a regular expression, or a grammar
    param: str
    strict: bool = False  # JSON schema: refuse keywords that cannot be enforced
    answer: ConstraintSpec | None = None  # rules: for "@answer" in them
    whitespace: str | None = None  # JSON schema: a pattern; "": none; None: at most one space
