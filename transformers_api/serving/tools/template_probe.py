"""A chat template asked what it writes: rendered with sentinels, cut at prompts, ends and tags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers_api.serving.text.common_prefix import common_prefix

Message = Mapping[str, Any]
# (messages, tools, add_generation_prompt, other variables) → text; None where it raises.
Render = Callable[[Sequence[Message], Sequence[Any] | None, bool, Mapping[str, Any]], str | None]

USER, ANSWER, THOUGHT = "zquserqz", "zqsaidqz", "zqwhyqz"
FUNCTIONS = ("zqfnaqz", "zqfnbqz")
KEYS = ("zqpaqz", "zqpbqz")
VALUES = ("zqvaqz", "zqvbqz")
IDS = ("zqida1qzz", "zqidb2qzz", "zqidc3qzz")  # nine letters and digits: some templates insist
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

    def calls(
        self,
        calls: Sequence[tuple[str, Mapping[str, Any]]],
        as_text: bool,
        content: str | None,
    ) -> str | None:
        """The text that a model would have to write for ``calls``, beside ``content``."""
        made = [call(name, args, i, as_text=as_text) for i, (name, args) in enumerate(calls)]
        return self.answer({"role": "assistant", "content": content, "tool_calls": made})

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
    """``text`` without the prompt that it begins with, or with whose last tags it goes on."""
    cut = common_prefix(text, prompt)
    rest = text[before_tag(text, cut) :]
    if cut == len(prompt):
        return rest
    # A prompt may hold more than turns do: instructions before the header of the answer.
    sizes = range(min(len(rest), len(prompt)), 0, -1)
    size = next((size for size in sizes if prompt.endswith(rest[:size])), 0)
    parts = (rest[:size].rstrip(), prompt[: len(prompt) - size])  # a tag in it, or one before it
    return rest[size:] if size and any(part.endswith((">", "]")) for part in parts) else rest


def without_end(text: str, end: str) -> str:
    """``text`` without the end of a turn; a tag that both share belongs to the text."""
    cut = len(text) - common_prefix(text[::-1], end[::-1])
    if before_tag(text, cut) < cut:
        cut = min(at for mark in ">]" if (at := text.find(mark, cut)) >= 0) + 1
    return text[:cut] if text[:cut].strip() else ""


def after_thought(text: str, mark: str, stop: int) -> str:
    """``text`` behind the last ``mark``, the end of a thought, before ``stop``."""
    at = text.rfind(mark, 0, stop) if mark else -1
    return text if at < 0 else text[at + len(mark) :]
