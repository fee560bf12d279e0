"""A chat template asked what it writes: rendered with sentinels, cut at prompts, ends and tags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
# (messages, tools, add_generation_prompt, other variables) → text; None where it raises.
Render = Callable[[Sequence[Message], Sequence[Any] | None, bool, Mapping[str, Any]], str | None]

USER, ANSWER, THOUGHT = "zquserqz", "zqsaidqz", "zqwhyqz"
FUNCTIONS = ("zqfnaqz", "zqfnbqz")
KEYS = ("zqpaqz", "zqpbqz")
VALUES = ("zqvaqz", "zqvbqz")
IDS = ("zqida1qzz", "zqidb2qzz")  # nine letters and digits: some templates insist
NOTHING: Mapping[str, Any] = {}


def _tool(name: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": "text"} for key in KEYS}
    schema = {"type": "object", "properties": properties, "required": list(KEYS)}
    function = {"name": name, "description": "does", "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = tuple(map(_tool, FUNCTIONS))
HELLO: Message = {"role": "user", "content": USER}


def call(name: str, arguments: Mapping[str, Any], place: int = 0, *, as_text: bool) -> Message:
    """A call as a history holds it."""
    written = json.dumps(arguments) if as_text else dict(arguments)
    function = {"name": name, "arguments": written}
    return {"id": IDS[place], "type": "function", "function": function}


@dataclass(frozen=True)
class TemplateProbe:
    """One template."""

    render: Render

    def turn(self, message: Message, tools: Sequence[Any] | None = TOOLS) -> str | None:
        """The text behind the user's turn with an assistant's ``message`` after it."""
        return after_user(self.render([HELLO, message], tools, False, NOTHING))

    def prompt(self, tools: Sequence[Any] | None = TOOLS, **variables: Any) -> str:
        """The text behind the user's turn where the assistant is to go on."""
        return after_user(self.render([HELLO], tools, True, variables)) or ""

    def answer(self, message: Message) -> str | None:
        """The text that a model would have to write for ``message``."""
        text = self.turn(message)
        return None if text is None else after_prompt(text, self.prompt())

    @property
    def end_of_turn(self) -> str:
        """The text that closes an assistant's turn."""
        text = self.turn({"role": "assistant", "content": ANSWER}) or ""
        return text.partition(ANSWER)[2]


def after_user(text: str | None) -> str | None:
    """The text behind the user's sentinel."""
    if text is None or USER not in text:
        return None
    return text[text.rfind(USER) + len(USER) :]


def common(one: str, other: str) -> int:
    """Characters at the start that both share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def before_tag(text: str, cut: int) -> int:
    """The cut, moved to the start of a tag that it would halve."""
    for opening, closing in ("<>", "[]"):
        start = text.rfind(opening, 0, cut)
        if start < 0 or closing in text[start:cut]:
            continue
        if 0 <= text.find(closing, cut) - start < 60:
            return start
    return cut


def after_prompt(text: str, prompt: str) -> str:
    """``text`` without the prompt that it begins with."""
    return text[before_tag(text, common(text, prompt)) :]


def without_end(text: str, end: str) -> str:
    """``text`` without the end of a turn; a tag that both share belongs to the text."""
    cut = len(text) - common(text[::-1], end[::-1])
    if before_tag(text, cut) < cut:
        cut = min(at for mark in ">]" if (at := text.find(mark, cut)) >= 0) + 1
    return text[:cut] if text[:cut].strip() else ""
