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

from transformers_api.serving.text.common_prefix import common_prefix
from transformers_api.serving.tools.call_format import (
    SLOT_COUNT,
    SLOT_ID,
    SLOT_NAME,
    CallFormat,
)
from transformers_api.serving.tools.round_trip import reads_back
from transformers_api.serving.tools.template_probe import (
    ANSWER,
    FUNCTIONS,
    IDS,
    KEYS,
    VALUES,
    TemplateProbe,
    after_thought,
    before_tag,
    call,
    without_end,
)

_F, _G = FUNCTIONS
_A, _B = KEYS
_VA, _VB = VALUES
_ONE = {_A: _VA, _B: _VB}
_OTHER = {_A: _VB, _B: _VA}
_CHANNEL = re.compile(r"(<\|channel\|>\w+) (\w+)(<\|message\|>)")
_HEADER = re.compile(r"(<\|start\|>\w+)")
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
    return style if style is not None and reads_back(probe, style, thought_ends) else None


def example(probe: TemplateProbe, style: CallFormat) -> str:
    """A call as the template writes it, with names that explain themselves."""
    content = None if style.content_is_null else ""
    text = probe.calls([("function_name", {"argument": "value"})], style.takes_text, content) or ""
    return without_end(text, probe.end_of_turn).replace(IDS[0], "000000000").strip()


def _variant(probe: TemplateProbe) -> _Variant | None:
    """The way that the template takes calls best."""
    best: tuple[float, _Variant] | None = None
    for as_text in (False, True):
        for content in ("", None):
            text = probe.calls([(_F, _ONE)], as_text, content)
            cores = None if text is None or _F not in text else _cores(text, [(_F, _ONE)])
            if not text or not cores:
                continue
            is_python = repr(_ONE) in text and not as_text  # it wants text
            kind = cores[0].kind
            if is_python and kind == "tagged":
                continue
            score = (3.0 if kind != "tagged" else 2.0) - 1.5 * as_text - 2.0 * is_python
            score -= len(text) / 1e6  # null as content may be written as a word, or an empty turn
            if best is None or score > best[0]:
                best = score, _Variant(as_text, content, text, cores[0])
    return None if best is None else best[1]


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
        style = replace(
            style,
            takes_text=variant.as_text,
            content_is_null=variant.content is None,
            has_short_ids=not self._takes_long_ids(),
            is_indented=core.kind != "tagged" and "\n" in text[core.start : core.end],
            **slotted,
        )
        return _with_channels(style)

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
        two = self._probe.calls(calls, self._variant.as_text, self._variant.content)
        cores = _cores(two, calls) if two is not None and _G in two else None
        if two is None or not cores:
            return style
        first, second = cores
        if first.kind == "json":
            style = _with_counter(style, first.value, second.value)
        if first.kind == "named":
            mid = two[second.start + len(_G) : second.value[0]]
            style = replace(style, mid=_counted(style.mid, mid))
        more = self._rest if first.kind == "tagged" else 0
        tail = without_end(two[second.end + more :], self._end)
        return replace(
            style,
            between=two[first.end + more : second.start],
            lead=self._without_thought(two[: first.start]),
            tail=tail if len(tail) < len(style.tail) else style.tail,
        )

    def _with_content(self, style: CallFormat) -> CallFormat:
        text = self._probe.calls([(_F, _ONE)], self._variant.as_text, ANSWER)
        if text is None or not 0 <= text.find(ANSWER) < text.find(_F):
            return style
        cores = _cores(text, [(_F, _ONE)])
        if not cores:
            return style
        return replace(
            style, lead_after_content=text[text.find(ANSWER) + len(ANSWER) : cores[0].start]
        )

    def _without_thought(self, lead: str) -> str:
        return after_thought(lead, self._thought_ends, len(lead))

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
        turned = self._values({_B: _VB, _A: _VA}) or ""
        style = replace(style, sorts_keys=0 <= turned.find(_A) < turned.find(_B))
        after = text[vb + len(_VB) :].removeprefix(style.quotes[1])
        close = after[: before_tag(after, common_prefix(style.sep, after))]
        empty = ""
        none = self._values({})
        if none is not None and _F in none:
            rest = none[none.find(_F) + len(_F) :]
            shared = common_prefix(after[::-1], rest[::-1])
            longer = after[: before_tag(after, len(after) - shared)]
            close = longer if len(longer) > len(close) else close
            behind = after[len(close) :]
            shared = len(behind) if rest.endswith(behind) else shared
            empty = rest[: len(rest) - shared]
        return replace(style, close=close, empty=empty)

    def _values(self, arguments: Mapping[str, Any]) -> str | None:
        variant = self._variant
        return self._probe.calls([(_F, arguments)], variant.as_text, variant.content)

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
                nested = self._between_keys({_F: _VA}) or ""
                nests = f'"{_F}"' in nested and f'"{_VA}"' in nested
                style = replace(style, quotes=quotes, kv=before, sep=after, nests_json=nests)
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
            return CallFormat(core="json")
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
    return replace(style, constants=constants, keys=tuple(value))


def _with_counter(
    style: CallFormat, first: Mapping[str, Any], second: Mapping[str, Any]
) -> CallFormat:
    """``style`` with the key that counts the calls of a turn, where there is one."""
    for key, value in style.constants.items():
        other = second.get(key)
        if isinstance(value, str | int) and other != value and str(other).isdecimal():
            constants = {name: item for name, item in style.constants.items() if name != key}
            return replace(style, constants=constants, counter_key=key, counter_start=value)
    return style


def _counted(first: str, second: str) -> str:
    """``first`` with slots for the numbers that are others in ``second``."""
    parts, others = re.split(r"(\d+)", first), re.split(r"(\d+)", second)
    if parts[::2] != others[::2]:
        return first
    pairs = zip(parts, others, strict=True)
    return "".join(one if one == other else SLOT_COUNT for one, other in pairs)


def _with_channels(style: CallFormat) -> CallFormat:
    """``style`` with the words of a header in the other order, too: of channels and recipients.

    The one form that models write in another order than templates: the recipient in the channel.
    """
    match = _CHANNEL.fullmatch(style.mid)
    if style.core != "named" or match is None or style.between is not None:
        return style
    channel, kind, message = match.groups()
    headed = channel + style.lead
    leads = [headed]
    header = _HEADER.search(style.lead_after_content or "")
    if header is not None:  # behind a thought, whose end is no part of it
        leads += [header[1] + style.lead, header[1] + headed]
    if style.lead_after_content:
        leads.append(style.lead_after_content.removesuffix(style.lead) + headed)
    mids = (
        f" {kind}{message}",
        f" <|constrain|>{kind}{message}",
        f"{channel} <|constrain|>{kind}{message}",
    )
    return replace(style, other_leads=tuple(leads), other_mids=mids)


def _slotted(text: str) -> str:
    text = re.sub("|".join(IDS), SLOT_ID, text)
    return re.sub("|".join(FUNCTIONS), SLOT_NAME, text)
