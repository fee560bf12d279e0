"""One request decided: how its calls look, what its answer is held to, how that is read.

Everything that depends on a model's template is asked here, once, and the routes only see parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers_api.engine.base import TokenConstraint
from transformers_api.errors import ConstraintsUnavailable, InvalidRequest
from transformers_api.serving.constraints.compiler import Compiler
from transformers_api.serving.constraints.phases import Phases, Thought
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.text.vocabulary import Vocabulary
from transformers_api.serving.tools.call_format import (
    OWN_FORMAT,
    SLOT_COUNT,
    SLOT_ID,
    SLOT_NAME,
    CallFormat,
)
from transformers_api.serving.tools.call_grammar import CallGrammar
from transformers_api.serving.tools.call_parser import AnswerParser
from transformers_api.serving.tools.checked_parser import CheckedParser
from transformers_api.serving.tools.reasoning_style import ReasoningStyle
from transformers_api.serving.tools.spec import ToolUse

_MARK = 0xDC00  # half surrogate pairs, which no text holds, stand for special tokens
_LITERALS = (
    "lead",
    "lead_after_content",
    "between",
    "tail",
    "mid",
    "open",
    "kv",
    "kv_json",
    "sep",
    "close",
    "empty",
)
_LISTS = ("quotes", "other_leads", "other_mids")
_SLOT = re.compile(f"{SLOT_ID}|{SLOT_NAME}|{SLOT_COUNT}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """The way in which one answer is held and read."""

    style: CallFormat | None
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    thought: tuple[str, str] | None = None
    is_thinking: bool = False  # the prompt has opened the thought
    openings: Sequence[str] = ()  # headers before what is said
    marks: Mapping[int, str] = field(default_factory=dict)  # of special tokens, by id
    constrain: Callable[[], TokenConstraint] | None = None
    warnings: Sequence[str] = ()  # what of a schema is not enforced
    are_held: bool = True  # calls, by a grammar
    choice: str = "auto"  # of calls: or "required"
    format: str = "derived"  # of calls, from the template: or "own", "upstream"

    @property
    def has_parts(self) -> bool:
        """True where there may be more to an answer than its text."""
        return self.style is not None or self.thought is not None or self.format == "upstream"

    def parser(self) -> AnswerParser:
        """A parser of one answer."""
        make = AnswerParser if self.are_held else CheckedParser
        return make(
            self.style,
            self.schemas,
            thought=self.thought,
            is_thinking=self.is_thinking,
            openings=self.openings,
            must_call=self.choice == "required",
        )


def plan(
    compiler: Compiler,
    vocabulary: Vocabulary,
    *,
    style: CallFormat | None,
    use: ToolUse | None,
    form: ConstraintSpec | None = None,
    reasoning: ReasoningStyle | None = None,
    openings: Sequence[str] = (),
    prompt: str = "",
    budget: int | None = None,
    ignore_eos: bool = False,
    prefix: str = "",
    param: str = "tools",
) -> AnswerPlan:
    """The plan of an answer to ``prompt``, whose end shows whether the model thinks already.

    ``style``: None where no calls are read. ``openings``: headers before what is said. ``budget``:
    tokens of thinking, None: as many as it likes. Raises InvalidRequest, ConstraintsUnavailable.
    """
    special = {vocabulary.added[i]: i for i in vocabulary.special_ids if vocabulary.added[i]}
    is_thinking = reasoning is not None and _opens(prompt, reasoning)
    phases = Phases(forbidden=compiler.end_ids if ignore_eos else ())
    if reasoning is not None:
        phases = replace(
            phases, thought=_thought(compiler, reasoning, special, is_thinking, budget)
        )
    # A form that is any text may be a call, too.
    are_held = form is None or form.kind == "json_schema"
    schemas = {} if use is None else {tool.name: tool.parameters for tool in use.tools}
    try:
        phases = _with_grammar(phases, compiler, style, use, form, special, param)
    except ConstraintsUnavailable:
        if form is not None or (use is not None and use.mode == "required"):
            raise
        phases, are_held = replace(phases, grammar=None, loose=None, trigger=None), False
    phases = _continued(phases, compiler, prefix)
    marks = {
        token: chr(_MARK + place)
        for place, token in enumerate(_used(style, reasoning, openings, special))
    }
    mark_texts = {text: marks[token] for text, token in special.items() if token in marks}
    needs = phases.grammar is not None or (budget is not None and reasoning is not None)
    return AnswerPlan(
        style=None if style is None else _marked(style, mark_texts),
        schemas=schemas,
        thought=None
        if reasoning is None
        else (_with_marks(reasoning.open, mark_texts), _with_marks(reasoning.close, mark_texts)),
        is_thinking=is_thinking,
        openings=[_with_marks(text, mark_texts) for text in openings],
        marks=marks,
        constrain=(lambda: phases.start(compiler, vocabulary)) if needs else None,
        warnings=phases.grammar.warnings if form is not None and phases.grammar is not None else (),
        are_held=are_held,
        choice="auto" if use is None else use.mode,
        format="own" if style is OWN_FORMAT else "derived",
    )


def _continued(phases: Phases, compiler: Compiler, prefix: str) -> Phases:
    """``phases`` whose grammar has ``prefix`` behind it, which stands in the prompt."""
    if not prefix or phases.grammar is None or phases.trigger is not None:
        return phases
    tokens = compiler.encode(prefix)
    if not phases.grammar.fits(tokens):
        raise InvalidRequest(
            "The message that is to be continued does not fit the format of the answer",
            param="messages",
        )
    return replace(phases, prefix=tokens)


def _with_grammar(
    phases: Phases,
    compiler: Compiler,
    style: CallFormat | None,
    use: ToolUse | None,
    form: ConstraintSpec | None,
    special: Mapping[str, int],
    param: str,
) -> Phases:
    if use is None or style is None:
        return phases if form is None else replace(phases, grammar=compiler.compile(form))
    rules = CallGrammar(style, use.callable, special, parallel=use.parallel)
    leads = [style.lead.lstrip(), *(text.lstrip() for text in style.other_leads)]
    trigger, answer = None, None
    if use.mode == "auto" and form is None:
        trigger = _trigger(style, use)
        leads = [text.lstrip() for text in style.leads]
    elif use.mode == "auto" and form is not None:
        compiler.compile(form)  # what is wrong with it alone is said of it
        answer = form
    source = rules.source(leads=leads, answer="@answer" if answer else None)
    grammar, loose = compiler.compile(_rules(source, param, answer)), None
    spaced = [text for text in leads if text != text.rstrip()]
    if trigger is not None and any(not t.rstrip().endswith(tuple(special)) for t in spaced):
        source = rules.source(leads=leads, is_loose=True)
        loose = compiler.compile(_rules(source, param))
    return replace(phases, grammar=grammar, loose=loose, trigger=trigger)


def _rules(source: str, param: str, answer: ConstraintSpec | None = None) -> ConstraintSpec:
    return ConstraintSpec(kind="rules", source=source, param=param, answer=answer)


def _trigger(style: CallFormat, use: ToolUse) -> re.Pattern[bytes]:
    """The beginning of a call in free text: a lead; without one, a core at the very start."""
    starts = [_SLOT.split(lead.strip())[0].rstrip() for lead in style.leads]
    bodies = [re.escape(start) for start in dict.fromkeys(starts) if start]
    patterns = [f"({'|'.join(bodies)})"] if bodies else []
    if not all(starts):
        patterns.append(rf"\A\s*({_core_start(style, use)})")
    return re.compile("|".join(patterns).encode())


def _core_start(style: CallFormat, use: ToolUse) -> str:
    names = "|".join(re.escape(tool.name) for tool in use.callable)
    match style.core:
        case "json":
            first = (style.keys or (style.name_key,))[0]
            key = re.escape(first) if style.name_key else f"(?:{names})"
            return rf'\{{\s*"{key}"'
        case "named":
            return f"(?:{names}){re.escape(_SLOT.split(style.mid)[0])}"
        case "tagged":
            return f"(?:{names}){re.escape(style.open)}"


def _thought(
    compiler: Compiler,
    reasoning: ReasoningStyle,
    special: Mapping[str, int],
    is_open: bool,
    budget: int | None,
) -> Thought:
    def ids(mark: str) -> tuple[int, ...]:
        return (special[mark],) if mark in special else tuple(compiler.encode(mark))

    opening = ids(reasoning.open) if reasoning.open else ()
    return Thought(
        open_id=opening[0] if len(opening) == 1 else None,
        close=reasoning.close.encode(),
        close_ids=ids(reasoning.close),
        budget=budget,
        is_open=is_open,
    )


def _opens(prompt: str, reasoning: ReasoningStyle) -> bool:
    """True where the prompt ends inside a thought."""
    tail = prompt[-4096:].rstrip()
    if not reasoning.open:
        return True  # only its end is marked
    return tail.endswith(reasoning.open.rstrip())


def _used(
    style: CallFormat | None,
    reasoning: ReasoningStyle | None,
    openings: Sequence[str],
    special: Mapping[str, int],
) -> Sequence[int]:
    """The special tokens that stand in the literals."""
    texts = list(openings)
    texts += [] if reasoning is None else [reasoning.open, reasoning.close]
    texts += [] if style is None else _literals(style).values()
    return sorted(token for text, token in special.items() if any(text in t for t in texts))


def _literals(style: CallFormat) -> dict[str, str]:
    literals = {name: getattr(style, name) for name in _LITERALS}
    lists = {name: getattr(style, name) for name in _LISTS}
    return {name: text for name, text in literals.items() if text} | {
        f"{name}{place}": text
        for name, texts in lists.items()
        for place, text in enumerate(texts)
        if text
    }


def _marked(style: CallFormat, marks: Mapping[str, str]) -> CallFormat:
    """``style`` with marks in place of special tokens, as the detokenizer shows them."""
    if not marks:
        return style
    changed: dict[str, Any] = {
        name: _with_marks(text, marks) for name, text in _literals(style).items()
    }
    for name in _LISTS:
        places = range(len(getattr(style, name)))
        changed[name] = tuple(changed.pop(f"{name}{place}", "") for place in places)
    return replace(style, **changed)


def _with_marks(text: str, marks: Mapping[str, str]) -> str:
    for special in sorted(marks, key=len, reverse=True):
        text = text.replace(special, marks[special])
    return text
