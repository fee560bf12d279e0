"""A conversation that is answered in parts, in whatever words a route has for it.

Chat completions, responses, messages and Ollama's chat make one of these of their bodies. It knows
the prompt of a model, and how the answer is held and read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from transformers_api.api.openai.structured import tell_ignored
from transformers_api.errors import InvalidRequest
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.chat_template import ChatPrompt
from transformers_api.serving.text.model_text import ModelText
from transformers_api.serving.tools import answer_plan
from transformers_api.serving.tools.answer_plan import AnswerPlan
from transformers_api.serving.tools.call_format import OWN_FORMAT
from transformers_api.serving.tools.spec import ToolUse

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """The thinking of a model before it answers."""

    enabled: bool | None = None  # None: as its template has it
    budget: int | None = None  # tokens; None: as many as it likes
    is_shown: bool = True  # apart from the answer; else as a part of its text


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages as chat completions have them, and what the answer to them may be."""

    messages: Sequence[Message]
    use: ToolUse | None = None
    form: ConstraintSpec | None = None
    thinking: Thinking = field(default_factory=Thinking)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    variables: Mapping[str, Any] | None = None  # of the template
    tools_param: str = "tools"
    drops_oldest: bool = False  # turns that do not fit the context

    def template_options(self, model: ModelText) -> dict[str, Any]:
        """The options that make the prompt of ``model``."""
        variables = dict(self.variables or {})
        reasoning = chat_template.reasoning_style(model)
        enabled = self.thinking.enabled
        if enabled is not None and reasoning is not None and reasoning.has_switch:
            variables.setdefault("enable_thinking", enabled)
            variables.setdefault("thinking", enabled)
        return {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "chat_template_kwargs": variables,
            "tools": () if self.use is None else self.use.tools,
            "hint": self._hint if model.spec.schema_hint else "",
        }

    @property
    def _hint(self) -> str:
        """The words that tell a model of the schema of its answer."""
        if self.form is None or self.form.kind != "json_schema":
            return ""
        return f"Answer in JSON that fits this JSON schema:\n{self.form.source}"

    def encode(self, model: ModelText) -> ChatPrompt:
        """The prompt. Raises what ``chat_template.encode`` does."""
        options = self.template_options(model)
        prompt = chat_template.encode(model, self.messages, **options)
        most = model.max_model_len
        if not self.drops_oldest or len(prompt.ids) < most:
            return prompt
        groups = list(_groups(self.messages))
        low, high = 1, len(groups) - 1  # groups that are dropped; the last stays
        while low <= high:
            middle = (low + high) // 2
            turns = [*_system(self.messages), *chain.from_iterable(groups[middle:])]
            shorter = chat_template.encode(model, turns, **options)
            if len(shorter.ids) < most:
                prompt, high = shorter, middle - 1
            else:
                low = middle + 1
        return prompt

    def plan(
        self, model: LoadedModel, prompt: ChatPrompt, *, ignore_eos: bool = False
    ) -> AnswerPlan | None:
        """The way in which the answer is held and read; None where it is plain text.

        Raises InvalidRequest, ConstraintsUnavailable.
        """
        reasoning = chat_template.reasoning_style(model)
        openings: Sequence[str] = ()
        if chat_template.chat_mode(model) == "template":
            openings = model.template.answer_openings
        if self.use is None and self.form is None and reasoning is None:
            return None
        style = None
        if self.use is not None:
            style = chat_template.call_format(model) or OWN_FORMAT
        compiler, budget = model.compiler, self.thinking.budget
        if self.thinking.enabled is False and reasoning is not None and not reasoning.has_switch:
            budget = 0
        plan = answer_plan.plan(
            compiler,
            model.vocabulary,
            style=style,
            use=self.use,
            form=self.form,
            reasoning=reasoning,
            openings=openings,
            prompt=prompt.text,
            budget=budget,
            ignore_eos=ignore_eos,
            prefix=self._prefix,
            param=self.tools_param,
        )
        tell_ignored(plan.warnings)
        return plan if self.thinking.is_shown else replace(plan, thought=None)

    @property
    def _prefix(self) -> str:
        """The beginning of the answer that stands in the prompt."""
        if not self.continue_final_message:
            return ""
        return chat_template.content_text(self.messages[-1])


def _system(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] in ("system", "developer")]


def _groups(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Turns that are dropped together: calls with their results; never instructions."""
    group: list[Message] = []
    for message in messages:
        if message["role"] in ("system", "developer"):
            continue
        if group and message["role"] != "tool":
            yield group
            group = []
        group.append(message)
    if group:
        yield group


def planned(
    request: GenerationRequest, plan: AnswerPlan | None, *, strips_blank: bool
) -> GenerationRequest:
    """``request`` held to ``plan``; ``strips_blank`` is for answers without a form or parts."""
    if plan is None:
        return replace(request, strips_blank=strips_blank)
    marks = plan.marks if plan.has_parts else {}
    is_free = plan.constrain is None and not plan.has_parts
    return replace(
        request,
        constrain=plan.constrain,
        marks=marks,
        strips_blank=strips_blank and is_free,
    )


class CallIds:
    """The ids of the calls of a conversation so far; results have to be of one of them."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._has_unnamed = False  # a call without an id: any result may be of it

    def add(self, turn: Message) -> None:
        """Note the calls of a turn."""
        calls = turn.get("tool_calls") or ()
        self._ids |= {call["id"] for call in calls if "id" in call}
        self._has_unnamed |= any("id" not in call for call in calls)

    def check(self, call_id: str, field: str) -> None:
        """Raise InvalidRequest, which names ``field``, for a result of no call before it."""
        if call_id not in self._ids and not self._has_unnamed:
            raise InvalidRequest(f"'{field}' is of no call before it", param=field)


def check_results(messages: Sequence[Message]) -> None:
    """Raise InvalidRequest for a result of a call that nobody has made."""
    calls = CallIds()
    for place, message in enumerate(messages):
        calls.add(message)
        if message["role"] == "tool":
            calls.check(message["tool_call_id"], f"messages[{place}].tool_call_id")
