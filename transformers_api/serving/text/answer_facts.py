"""Facts of a model's answers that its tokenizer tells: calls, thoughts, answers of a form."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from transformers_api.serving.constraints.compiler import Compiler
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.model_text import ModelText
from transformers_api.serving.tools.call_format import (
    OWN_FORMAT,
    SLOT_COUNT,
    SLOT_ID,
    SLOT_NAME,
    CallFormat,
)
from transformers_api.serving.tools.reasoning_style import ReasoningStyle

_SLOTS = {SLOT_ID: "{id}", SLOT_NAME: "{name}", SLOT_COUNT: "{count}"}


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """The way in which a model's answers are written."""

    structured_outputs: bool  # they can be held to a form
    tools: Literal["derived", "prompt"] | None = None  # None: it does not chat
    calls: CallFormat | None = None
    thoughts: ReasoningStyle | None = None


def answer_facts(model: ModelText) -> AnswerFacts:
    """The facts of a model, with its weights or without. Raises ModelNotCapable for its template.

    Takes some 0.05 s at first, then the template knows its formats.
    """
    compiler = Compiler(model.tokenizer, model.vocabulary, model.vocab_size, model.end_of_turn)
    if model.spec.chat == "off":
        return AnswerFacts(compiler.spells_text)
    derived = chat_template.call_format(model)
    return AnswerFacts(
        compiler.spells_text,
        "prompt" if derived is None else "derived",
        derived or OWN_FORMAT,
        chat_template.reasoning_style(model),
    )


def style_fields(style: CallFormat | ReasoningStyle) -> dict[str, Any]:
    """The fields of a format that are not their defaults; ``{name}`` and such are slots."""
    return {
        each.name: _with_slots(value)
        for each in fields(style)
        if (value := getattr(style, each.name)) != each.default
        and (each.default_factory is MISSING or value != each.default_factory())
    }


def _with_slots(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_with_slots(each) for each in value]
    if isinstance(value, str):
        for slot, name in _SLOTS.items():
            value = value.replace(slot, name)
    return value
