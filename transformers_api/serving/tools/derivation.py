"""From a chat template to the format of its calls. No model is named.

The template is rendered with sentinels; one call is compared with two, and a turn with calls with
one that speaks. A format counts only if it reads back what the template writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers_api.serving.tools.call_format import SLOT_ID, SLOT_NAME, CallFormat
from transformers_api.serving.tools.call_parser import AnswerParser
from transformers_api.serving.tools.spec import CallArguments, CallStart, Part
from transformers_api.serving.tools.template_probe import (
    ANSWER,
    FUNCTIONS,
    IDS,
    KEYS,
    TOOLS,
    VALUES,
    TemplateProbe,
    before_tag,
    call,
    common,
    without_end,
)

_F, _G = FUNCTIONS
_A, _B = KEYS
_VA, _VB = VALUES
_ONE = {_A: _VA, _B: _VB}
_OTHER = {_A: _VB, _B: _VA}
_MARKS = ("lead", "lead_after_content", "between", "tail", "mid", "open", "close")


@dataclass(frozen=True, slots=True)
class _Core:
    """The place of a call in a text, and the way it is written."""

    start: int
    end: int
    kind: str
    value: Any = None  # the object; of a named one (its start, the object)


@dataclass(frozen=True, slots=True)
class _Variant:
    """One way to hand calls to the template, and what it writes of one call."""

    as_text: bool
    content: str | None
    text: str
    core: _Core


def derive(probe: TemplateProbe, thought_ends: str = "") -> CallFormat | None:
    """The format of the calls that the template shows; None where it shows none that reads back.

    ``thought_ends``: the mark that ends what a model thinks, which is no part of a lead.
    """
    variant = _variant(probe)
    if variant is None:
        return None
    style = _Derivation(probe, variant, thought_ends).style()
    return style if style is not None and _reads_back(probe, style, thought_ends) else None


def _variant(probe: TemplateProbe) -> _Variant | None:
    """The way that the template takes calls best."""
    best: tuple[float, _Variant] | None = None
    for as_text in (False, True):
        for content in ("", None):
            text = _written(probe, [(_F, _ONE)], as_text, content)
            cores = None if text is None or _F not in text else _cores(text, [(_F, _ONE)])
            if not text or not cores:
                continue
            is_python = repr(_ONE) in text and not as_text  # it wants text
            kind = cores[0].kind
            if is_python and kind == "tagged":
                continue
            score = (3.0 if kind != "tagged" else 2.0) - 1.5 * as_text - 2.0 * is_python
            if best is None or score > best[0]:
                best = score, _Variant(as_text, content, text, cores[0])
    return None if best is None else best[1]


def _written(
    probe: TemplateProbe,
    calls: Sequence[tuple[str, Mapping[str, Any]]],
    as_text: bool,
    content: str | None,
) -> str | None:
    made = [call(name, args, i, as_text=as_text) for i, (name, args) in enumerate(calls)]
    return probe.answer({"role": "assistant", "content": content, "tool_calls": made})


class _Derivation:
    """The literals around and inside the calls of one template."""

    def __init__(self, probe: TemplateProbe, variant: _Variant, thought_ends: str) -> None:
        self._probe = probe
        self._variant = variant
        self._thought_ends = thought_ends
        self._end = probe.end_of_turn
        self._rest = 0  # characters behind the core that belong to it: of a tagged one

    def style(self) -> CallFormat | None:
        variant = self._variant
        core, text = variant.core, variant.text
        style = self._core()
        if style is None:
            return None
        self._rest = len(style.close) + len(style.quotes[1])
        stop = core.end + (self._rest if core.kind == "tagged" else 0)
        lead = self._without_thought(text[: core.start])
        style = replace(style, lead=lead, tail=without_end(text[stop:], self._end))
        style = self._with_second_call(style)
        style = self._with_content(style)
        slotted: dict[str, Any] = {
            name: _slotted(value) for name in _MARKS if (value := getattr(style, name))
        }
        return replace(
            style,
            takes_text=variant.as_text,
            content_is_null=variant.content is None,
            has_short_ids=not self._takes_long_ids(),
            **slotted,
        )

    def _takes_long_ids(self) -> bool:
        made = call(_F, _ONE, as_text=self._variant.as_text)
        message = {
            "role": "assistant",
            "content": self._variant.content,
            "tool_calls": [{**made, "id": "call_0123456789abcdef01234567"}],
        }
        return _F in (self._probe.turn(message) or "")

    def _core(self) -> CallFormat | None:
        core, text = self._variant.core, self._variant.text
        if core.kind == "json":
            return _keys(core.value)
        if core.kind == "named":
            return CallFormat(core="named", mid=text[core.start + len(_F) : core.value[0]])
        return self._tagged()

    def _with_second_call(self, style: CallFormat) -> CallFormat:
        calls = [(_F, _ONE), (_G, _OTHER)]
        two = _written(self._probe, calls, self._variant.as_text, self._variant.content)
        cores = _cores(two, calls) if two is not None and _G in two else None
        if two is None or not cores:
            return style
        first, second = cores
        more = self._rest if first.kind == "tagged" else 0
        tail = without_end(two[second.end + more :], self._end)
        return replace(
            style,
            between=two[first.end + more : second.start],
            lead=self._without_thought(two[: first.start]),
            tail=tail if len(tail) < len(style.tail) else style.tail,
        )

    def _with_content(self, style: CallFormat) -> CallFormat:
        text = _written(self._probe, [(_F, _ONE)], self._variant.as_text, ANSWER)
        if text is None or not 0 <= text.find(ANSWER) < text.find(_F):
            return style
        cores = _cores(text, [(_F, _ONE)])
        if not cores:
            return style
        return replace(
            style, lead_after_content=text[text.find(ANSWER) + len(ANSWER) : cores[0].start]
        )

    def _without_thought(self, lead: str) -> str:
        mark = self._thought_ends
        return lead.rpartition(mark)[2] if mark and mark in lead else lead

    def _tagged(self) -> CallFormat | None:
        text = self._variant.text
        at = self._variant.core.start + len(_F)
        a, va, b, vb = (text.find(sentinel, at) for sentinel in (_A, _VA, _B, _VB))
        if not at <= a < va < b < vb or text[b + len(_B) : vb] != text[a + len(_A) : va]:
            return None
        style = CallFormat(
            core="tagged",
            open=text[at:a],
            kv=text[a + len(_A) : va],
            sep=text[va + len(_VA) : b],
        )
        style = self._with_values(style)
        after = text[vb + len(_VB) :].removeprefix(style.quotes[1])
        close = after[: before_tag(after, common(style.sep, after))]
        empty = ""
        none = self._values({})
        if none is not None and _F in none:
            rest = none[none.find(_F) + len(_F) :]
            shared = common(after[::-1], rest[::-1])
            longer = after[: before_tag(after, len(after) - shared)]
            close = longer if len(longer) > len(close) else close
            empty = rest[: len(rest) - shared]
        return replace(style, close=close, empty=empty)

    def _values(self, arguments: Mapping[str, Any]) -> str | None:
        variant = self._variant
        return _written(self._probe, [(_F, arguments)], variant.as_text, variant.content)

    def _with_values(self, style: CallFormat) -> CallFormat:
        """The literals before values that are no strings, and the constants."""
        between = {
            name: between
            for name, value in (("number", 90210), ("true", True), ("false", False), ("null", None))
            if (between := self._between_keys(value)) is not None
        }
        before, number, after = between.get("number", "").partition("90210")
        if number and (before, after) != (style.kv, style.sep):
            if style.kv.startswith(before) and style.sep.endswith(after):
                quotes = style.kv[len(before) :], style.sep[: len(style.sep) - len(after)]
                style = replace(style, quotes=quotes, kv=before, sep=after)
            elif style.sep == after:
                style = replace(style, kv_json=before)
        start, end = style.kv_json or style.kv, style.sep
        constants: dict[str, Any] = {
            name: text[len(start) : len(text) - len(end)]
            for name, text in between.items()
            if name != "number" and text.startswith(start) and text.endswith(end)
        }
        return replace(style, **{name: text for name, text in constants.items() if text})

    def _between_keys(self, value: Any) -> str | None:
        text = self._values({_A: value, _B: _VB})
        if not text or _F not in text or _A not in text or _B not in text:
            return None
        start = text.find(_A, text.find(_F)) + len(_A)
        return text[start : text.find(_B, start)]


def _cores(text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> list[_Core] | None:
    """The cores of ``calls`` in a text that shows them."""
    cores: list[_Core] = []
    at = 0
    for name, arguments in calls:
        place = text.find(name, at)
        if place < 0:
            return None
        core = _core_at(text, place, at, name, arguments)
        if core is None:
            return None
        cores.append(core)
        at = core.end
    return cores


def _core_at(
    text: str, place: int, at: int, name: str, arguments: Mapping[str, Any]
) -> _Core | None:
    needles = [*arguments, *arguments.values()]
    whole = _object_around(text, place, [name, *needles])
    if whole is not None and whole[0] >= at:
        return _Core(whole[0], whole[1], "json", whole[2])
    keys = list(arguments)
    first = text.find(keys[0], place)
    if first < 0:
        return None
    inner = _object_around(text, first, needles)
    if inner is not None and inner[0] > place:
        return _Core(place, inner[1], "named", (inner[0], inner[2]))
    last = text.find(arguments[keys[-1]], first)
    return None if last < 0 else _Core(place, last + len(arguments[keys[-1]]), "tagged")


def _object_around(text: str, place: int, needles: Sequence[str]) -> tuple[int, int, Any] | None:
    """The smallest object around a place that holds all needles: (start, end, value)."""
    for start in range(place, -1, -1):
        if text[start] != "{":
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        written = json.dumps(value)
        if end > place and all(needle in written for needle in needles):
            return start, end, value
    return None


def _keys(value: Mapping[str, Any]) -> CallFormat | None:
    """The keys of an object that holds a call."""
    style = CallFormat(core="json")
    constants: dict[str, Any] = {}
    for key, item in value.items():
        if key == _F:
            return CallFormat(core="json", arguments_key="")
        if item == _F:
            style = replace(style, name_key=key)
        elif isinstance(item, dict) and _A in item:
            style = replace(style, arguments_key=key)
        elif isinstance(item, str) and _A in item:
            style = replace(style, arguments_key=key, arguments_are_text=True)
        elif item == IDS[0]:
            style = replace(style, id_key=key)
        else:
            constants[key] = item
    if not style.name_key or not style.arguments_key:
        return None
    return replace(style, constants=constants)


def _slotted(text: str) -> str:
    text = re.sub("|".join(IDS), SLOT_ID, text)
    return re.sub("|".join(FUNCTIONS), SLOT_NAME, text)


def _reads_back(probe: TemplateProbe, style: CallFormat, thought_ends: str) -> bool:
    """True where the format reads what the template writes of other calls."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    several: list[list[tuple[str, Mapping[str, Any]]]] = [
        [(_F, {_A: 'Köln & "Bonn" <x>', _B: "two words"})],
        [(_G, {_B: "b", _A: "a"})],
    ]
    if style.between is not None:
        several.append([(_F, _ONE), (_G, _OTHER)])
    content = None if style.content_is_null else ""
    for calls in several:
        text = _written(probe, calls, style.takes_text, content)
        if text is None:
            return False
        if thought_ends and thought_ends in text:
            text = text.rpartition(thought_ends)[2]
        parser = AnswerParser(style, schemas)
        try:
            read = _calls(parser.push(text) + parser.finish())
        except ValueError:
            return False
        if read != [(name, dict(arguments)) for name, arguments in calls]:
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
