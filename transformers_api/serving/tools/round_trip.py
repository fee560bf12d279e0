"""A format tried on its template: it counts only if it reads back what that writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers_api.serving.tools.call_format import CallFormat
from transformers_api.serving.tools.call_parser import AnswerParser
from transformers_api.serving.tools.spec import CallArguments, CallStart, Part
from transformers_api.serving.tools.template_probe import (
    FUNCTIONS,
    KEYS,
    VALUES,
    TemplateProbe,
    after_thought,
)

_F, _G = FUNCTIONS
_A, _B = KEYS
_PIECE = 7  # characters of a piece, where a text is read in pieces


def reads_back(probe: TemplateProbe, style: CallFormat, thought_ends: str) -> bool:
    """True where the format reads what the template writes of other calls."""
    text, other = {"type": "string"}, {"type": ["number", "boolean", "object"]}
    cases: list[tuple[Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]]] = [
        (text, [(_F, {_A: 'Köln & "Bonn" <x> it\'s \\n', _B: "two words"})]),
        (text, [(_G, {_B: "b", _A: "a"})]),
        (other, [(_F, {_A: True, _B: {"in": ["a b", 2]}})]),
        (other, [(_G, {_A: -1.5})]),
        (text, [(_F, {})]),
    ]
    if style.between is not None:
        one = dict(zip(KEYS, VALUES, strict=True))
        cases.append((text, [(_F, one), (_G, {}), (_F, {_A: "b", _B: "a"})]))
    return all(_reads(probe, style, thought_ends, *case) for case in cases)


def _reads(
    probe: TemplateProbe,
    style: CallFormat,
    thought_ends: str,
    schema: Mapping[str, Any],
    calls: Sequence[tuple[str, Mapping[str, Any]]],
) -> bool:
    """True where ``calls``, whose arguments are all of ``schema``, are read back."""
    content = None if style.content_is_null else ""
    text = probe.calls(calls, style.takes_text, content)
    if text is None:
        return False
    text = after_thought(text, thought_ends, text.find(calls[0][0]))
    schemas = {name: {"properties": dict.fromkeys(KEYS, schema)} for name in FUNCTIONS}
    expected = [(name, dict(arguments)) for name, arguments in calls]
    for size in (len(text) + 1, _PIECE):
        parser, parts = AnswerParser(style, schemas), []
        for at in range(0, len(text), size):
            parts += parser.push(text[at : at + size])
        try:
            read = _calls([*parts, *parser.finish()])
        except ValueError:
            return False
        if read != expected:
            return False
    return True


def _calls(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """The calls among the parts of an answer. Raises ValueError for broken arguments."""
    names = [part.name for part in parts if isinstance(part, CallStart)]
    written = [""] * len(names)
    for part in parts:
        if isinstance(part, CallArguments):
            written[part.index] += part.text
    return [(name, json.loads(text)) for name, text in zip(names, written, strict=True)]
