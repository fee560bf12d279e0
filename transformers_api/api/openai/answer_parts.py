"""The parts of an answer, choice by choice, as formatters of all routes take them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers_api.api.http.request_record import AnswerParts
from transformers_api.serving.generation import Choice, Generation, collect
from transformers_api.serving.text.choice_text import TextDelta
from transformers_api.serving.tools.answer_plan import AnswerPlan
from transformers_api.serving.tools.call_parser import AnswerParser
from transformers_api.serving.tools.spec import (
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
)


@dataclass(slots=True)
class Call:
    """A whole call."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class WholeAnswer:
    """One choice, its parts put together."""

    choice: Choice
    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    @property
    def finish_reason(self) -> str:
        """The choice's, or ``tool_calls``."""
        is_cut = self.choice.finish_reason == "length"
        return "tool_calls" if self.calls and not is_cut else self.choice.finish_reason

    def add(self, part: Part) -> None:
        """Put a part where it belongs."""
        match part:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case CallStart(_, name):
                self.calls.append(Call(new_call_id(), name))
            case CallArguments(index, text):
                self.calls[index].arguments += text


class AnswerReader:
    """Reads the choices of one answer, and counts what was thought."""

    def __init__(self, plan: AnswerPlan) -> None:
        self._plan = plan
        self._parsers: dict[int, AnswerParser] = {}  # by choice
        self.counts = AnswerParts(plan.choice, plan.format)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thoughts so far."""
        return self.counts.reasoning_tokens

    def parser(self, index: int) -> AnswerParser:
        """The parser of a choice."""
        if index not in self._parsers:
            self._parsers[index] = self._plan.parser()
        return self._parsers[index]

    def parts(self, delta: TextDelta) -> list[Part]:
        """The parts that a piece makes complete; at the end of a choice all that are left."""
        parser = self.parser(delta.index)
        if parser.is_thinking:
            self.counts.reasoning_tokens += len(delta.token_ids)
        calls = parser.calls
        if delta.parts is not None:
            parser.note(delta.parts)
            self.counts.reasoning_tokens += delta.reasoning_tokens
            self.counts.calls += parser.calls - calls
            return list(delta.parts)
        parts = parser.push(delta.text)
        if delta.finish_reason is not None:
            parts += parser.finish()
        self.counts.calls += parser.calls - calls
        return parts

    def whole(self, generation: Generation) -> list[WholeAnswer]:
        """All choices, read to their ends."""
        answers = []
        for choice in collect(generation, self._count_thought):
            answer, parser = WholeAnswer(choice), self._plan.parser()
            parts: Sequence[Part] | None = choice.parts
            if parts is None:
                parts = parser.push(choice.text) + parser.finish()
            for part in parts:
                answer.add(part)
            answers.append(answer)
        self.counts.calls = sum(len(answer.calls) for answer in answers)
        return answers

    def _count_thought(self, delta: TextDelta) -> None:
        """Hear of each piece while a whole answer is collected."""
        if delta.parts is not None:
            self.counts.reasoning_tokens += delta.reasoning_tokens
        elif self._plan.thought is not None:
            self.parts(delta)


def new_call_id() -> str:
    """``call_`` and 24 hexadecimal digits."""
    return f"call_{uuid.uuid4().hex[:24]}"
