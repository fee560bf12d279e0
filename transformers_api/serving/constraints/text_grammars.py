"""Constraints that are not JSON: regular expressions, choices, grammars, tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from transformers_api.errors import InvalidRequest
from transformers_api.serving.constraints.json_schema import MAX_BYTES, json_constraint
from transformers_api.serving.constraints.spec import ConstraintSpec

MAX_REGEX = 4 << 10  # characters
MAX_GRAMMAR = 64 << 10  # characters
MAX_CHOICES = 1024
MAX_TAGS = 128
MAX_CHOICE = 4 << 10  # characters of one, and sixteen times as many of all


def regex_constraint(pattern: str, param: str) -> ConstraintSpec:
    """The constraint of answers that match ``pattern`` as a whole. Raises InvalidRequest."""
    if not pattern or len(pattern) > MAX_REGEX:
        raise InvalidRequest(f"'{param}' must have from 1 to {MAX_REGEX} characters", param=param)
    return ConstraintSpec(kind="regex", source=pattern, param=param)


def choice_constraint(choices: Sequence[str], param: str) -> ConstraintSpec:
    """The constraint of answers that are one of ``choices``. Raises InvalidRequest."""
    if not 0 < len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"'{param}' must have from 1 to {MAX_CHOICES} items", param=param)
    for place, choice in enumerate(choices):
        if not 0 < len(choice) <= MAX_CHOICE:
            raise InvalidRequest(
                f"'{param}[{place}]' must have from 1 to {MAX_CHOICE} characters",
                param=f"{param}[{place}]",
            )
    if sum(map(len, choices)) > 16 * MAX_CHOICE:
        raise InvalidRequest(f"'{param}' has more than {16 * MAX_CHOICE} characters", param=param)
    return ConstraintSpec(kind="regex", source="|".join(map(literal, choices)), param=param)


def grammar_constraint(grammar: str, param: str) -> ConstraintSpec:
    """The constraint of a grammar, llama.cpp's (GBNF) or Lark's. Raises InvalidRequest."""
    if not grammar or len(grammar) > MAX_GRAMMAR:
        raise InvalidRequest(f"'{param}' must have from 1 to {MAX_GRAMMAR} characters", param=param)
    return ConstraintSpec(kind="lark", source=grammar, param=param)


def tags_constraint(
    structures: Sequence[Mapping[str, Any]], triggers: Sequence[str], param: str
) -> ConstraintSpec:
    """The constraint of free text with tags in it: ``begin``, JSON by ``schema``, ``end``.

    A tag is begun by its trigger, a beginning of ``begin``. Raises InvalidRequest.
    """
    if not 0 < len(structures) <= MAX_TAGS:
        raise InvalidRequest(f"'{param}' must have from 1 to {MAX_TAGS} structures", param=param)
    tags = []
    for place, structure in enumerate(structures):
        name = f"{param}.structures[{place}]"
        begin, end = structure.get("begin"), structure.get("end")
        if not isinstance(begin, str) or not isinstance(end, str) or len(begin + end) > MAX_CHOICE:
            raise InvalidRequest(f"'{name}' must have 'begin' and 'end', short texts", param=name)
        trigger = next((text for text in triggers if text and begin.startswith(text)), None)
        if trigger is None:
            raise InvalidRequest(f"'{name}.begin' begins with none of the triggers", param=name)
        schema = orjson.loads(json_constraint(structure.get("schema"), f"{name}.schema").source)
        tags.append({"trigger": trigger, "begin": begin, "schema": schema, "end": end})
    source = orjson.dumps(tags).decode()
    if len(source) > 2 * MAX_BYTES:
        raise InvalidRequest(f"'{param}' has more than {2 * MAX_BYTES} bytes", param=param)
    return ConstraintSpec(kind="tags", source=source, param=param)


def literal(text: str) -> str:
    """A pattern that matches ``text`` and nothing else."""
    return "".join(
        character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"
        for character in text
    )
