"""From a chat template to the marks around what its model thinks before it answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers_api.serving.text.common_prefix import common_prefix
from transformers_api.serving.tools.template_probe import (
    ANSWER,
    FUNCTIONS,
    HELLO,
    KEYS,
    THOUGHT,
    TOOLS,
    VALUES,
    TemplateProbe,
    after_user,
    before_tag,
    call,
)

_TAG = r"<[^<>\n]{1,60}>|\[[A-Z_/]{2,30}\]"
_NAMED = re.compile(
    r"(\[|<\|?/?|</?)([\w: ▁-]*(?:think|thought|reason|analysis)[\w:▁ -]*)(\|?>|\])", re.IGNORECASE
)
_EMPTY = re.compile(r"(<\|?[\w:]+\|?>|\[[A-Z]+\])\s*(<\|?/[\w:]+\|?>|\[/[A-Z]+\])\s*\Z")
_OPEN = re.compile(r"(<\|?)(\w*think\w*|\w*reason\w*)(\|?>)\Z|\[(THINK)\]\Z")
_ON: Mapping[str, Any] = {
    "enable_thinking": True,
    "thinking": True,
    "preserve_thinking": True,
    "clear_thinking": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningStyle:
    """The marks around what a model thinks before it answers."""

    open: str  # empty: only its end is marked
    close: str
    answer: str = ""  # what the template writes between ``close`` and the answer
    has_switch: bool = False  # ``enable_thinking`` changes the prompt


def derive_reasoning(probe: TemplateProbe, source: str) -> ReasoningStyle | None:
    """The marks that the template ``source`` shows or looks for; None where it knows of none."""
    thinks = probe.prompt(None, enable_thinking=True, thinking=True)
    answers = probe.prompt(None, enable_thinking=False, thinking=False)
    marks: tuple[str, ...] | None = (
        _from_fields(probe, thinks)
        or _from_history(probe, source)
        or _from_switch(thinks, answers)
        or _from_prompt(thinks)
        or _from_answer(probe)
    )
    if marks is None:
        return None
    answer = marks[2] if len(marks) > 2 else ""
    return ReasoningStyle(
        open=marks[0], close=marks[1], answer=answer, has_switch=thinks != answers
    )


def answer_openings(probe: TemplateProbe, reasoning: ReasoningStyle | None) -> tuple[str, ...]:
    """The headers that a model writes before what it says, the longest first."""
    text = probe.answer({"role": "assistant", "content": ANSWER}) or ""
    before, answer, _ = text.partition(ANSWER)
    openings = {before} if answer else set()
    if reasoning is not None:
        openings = {text.rpartition(reasoning.close)[2] for text in openings}
        openings.add(reasoning.answer)
    openings = {text.lstrip() for text in openings} - {""}
    return tuple(sorted(openings, key=len, reverse=True))


def _from_fields(probe: TemplateProbe, prompt: str) -> tuple[str, str, str] | None:
    """The template shows what an earlier turn has thought."""
    for message, tools, mark in _thoughtful():
        for variables in ({}, _ON):
            text = after_user(probe.render([HELLO, message], tools, False, variables)) or ""
            if THOUGHT not in text or mark not in text or re.search("[\"']type[\"']", text):
                continue
            before, _, rest = text.partition(THOUGHT)
            header = common_prefix(before, prompt)
            between = rest.partition(mark)[0]
            first = re.match(rf"\s*({_TAG})", between)
            close = first[1] if first else between.strip()
            lead = before[before_tag(before, header) :].strip()
            if not close:
                continue
            answer = between.partition(close)[2].strip() if mark == ANSWER else ""
            return lead or _opening(prompt[:header], close), close, answer
    return None


def _thoughtful() -> Iterator[tuple[dict[str, Any], Any, str]]:
    """(an assistant's turn that has thought, the tools beside it, what follows the thought)."""
    fields = {"reasoning_content": THOUGHT, "reasoning": THOUGHT, "thinking": THOUGHT}
    plain = {"role": "assistant", "content": ANSWER, **fields}
    yield plain, None, ANSWER
    parts = [
        {"type": "thinking", "thinking": THOUGHT, "closed": True},
        {"type": "text", "text": ANSWER},
    ]
    yield {**plain, "content": parts}, None, ANSWER
    arguments = dict(zip(KEYS, VALUES, strict=True))
    calls = [call(FUNCTIONS[0], arguments, as_text=False)]
    yield {**plain, "content": "", "tool_calls": calls}, TOOLS, FUNCTIONS[0]


def _opening(prompt: str, close: str) -> str:
    """The tag at the end of a prompt, where ``close`` is its counterpart."""
    tags = re.findall(_TAG, prompt.rstrip())
    if not tags or not prompt.rstrip().endswith(tags[-1]):
        return ""
    names = (re.sub(r"\W|START|END", "", tag) for tag in (tags[-1], close))
    return str(tags[-1]) if len(set(names)) == 1 else ""


def _from_history(probe: TemplateProbe, source: str) -> tuple[str, str] | None:
    """The template cuts earlier thoughts away, at a mark that it names."""
    names = sorted({match[0] for match in _NAMED.finditer(source)}, key=lambda m: "/" not in m)
    for mark in names:
        if "/" not in mark and "end" not in mark.lower():
            continue
        message = {"role": "assistant", "content": f"{THOUGHT}{mark}{ANSWER}"}
        for later in ((), ({"role": "user", "content": "x"},)):
            text = probe.render([HELLO, message, *later], None, False, {}) or ""
            if ANSWER in text and THOUGHT not in text:
                return mark.replace("/", "", 1).replace("END", "START"), mark
    return None


def _from_switch(thinks: str, answers: str) -> tuple[str, str] | None:
    """Without thinking the prompt holds an empty thought."""
    match = _EMPTY.search(answers) if thinks != answers else None
    return None if match is None else (match[1], match[2])


def _from_answer(probe: TemplateProbe) -> tuple[str, str] | None:
    """The template writes an empty thought before what an earlier turn has said."""
    text = probe.answer({"role": "assistant", "content": ANSWER}) or ""
    match = _EMPTY.search(text.partition(ANSWER)[0])
    if match is None or match[1] != match[2].replace("/", "", 1):
        return None
    return match[1], match[2]


def _from_prompt(thinks: str) -> tuple[str, str] | None:
    """The prompt ends inside a thought."""
    match = _OPEN.search(thinks.rstrip())
    if match is None:
        return None
    return match[0], match[0].replace("<", "</", 1).replace("[", "[/", 1)
