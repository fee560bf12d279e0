"""The chat template of one model: what it is like, and the text that it makes of messages."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from transformers_api.errors import InvalidRequest
from transformers_api.serving.text.control_tokens import BREAK, ControlTokens
from transformers_api.serving.text.template_renderer import TemplateFailed, renderer
from transformers_api.serving.tools.call_format import CallFormat
from transformers_api.serving.tools.derivation import derive, example
from transformers_api.serving.tools.reasoning_style import (
    ReasoningStyle,
    answer_openings,
    derive_reasoning,
)
from transformers_api.serving.tools.template_probe import (
    FUNCTIONS,
    HELLO,
    TOOLS,
    TemplateProbe,
    after_thought,
)

_PROBE = "qzprobeqz"
_TAG = "qzcontinueqz "  # transformers' way: where the space is cut off, so is the message's
_WORD = re.compile(r"[^\W_]+")
_LIST = re.compile("[\"']type[\"']: ")  # a list of parts that is written as such
_PROBED_S = 5.0  # of rendering, to find out what a template writes; an ordinary one takes 0.05
_LOOKED_AT = 4096  # characters of a message, for a word that must be in the prompt


@dataclass(frozen=True, slots=True)
class _Traits:
    """The behaviour of a template for messages of ours."""

    fault: str | None = None  # why it can never be used
    in_parts: frozenset[str] = frozenset()  # roles: it reads a list, and drops a plain text
    close: str = ""  # what it writes after an assistant's message


class ModelTemplate:
    """A tokenizer's chat template, and prompts made with it. From any thread.

    ``vocab_size``: of the model, which may lack tokens that were added to the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    @cached_property
    def source(self) -> str:
        """The template; empty where the tokenizer has none."""
        if not getattr(self._tokenizer, "chat_template", None):
            return ""
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError:  # several, and none of them the default
            return ""

    @cached_property
    def control(self) -> ControlTokens:
        """The tokens that only the template may write."""
        return ControlTokens(self._tokenizer, self.source)

    @property
    def fault(self) -> str | None:
        """Why no conversation can be rendered; None where some can."""
        return self._traits.fault

    @cached_property
    def end_of_turn(self) -> frozenset[int]:
        """The token with which the template closes an assistant's turn; empty when unknown.

        It is often not the tokenizer's end-of-sequence token: ``<|im_end|>``, ``<|eot_id|>``, ….
        Where the last turn is left open, it is the token before another turn.
        """
        added = self._tokenizer.added_tokens_decoder.items()
        # Added tokens that are only spaces (Gemma has some) close nothing.
        closing = {i for i, token in added if token.content.strip(" \t\r\n▁")}
        for close in self._closes():
            ids = self._tokenizer.encode(close, add_special_tokens=False)
            if first := [i for i in ids if i in closing][:1]:
                return frozenset(first)
        return frozenset()

    def missing_token(self, ids: Sequence[int]) -> str | None:
        """The fault of a prompt that has tokens which the model lacks; None: there is none."""
        size = self._vocab_size
        beyond = [] if size is None else [token for token in ids if token >= size]
        if not beyond:
            return None
        text = self._tokenizer.convert_ids_to_tokens(beyond[0])
        return (
            f"it writes {text!r}, which is token {beyond[0]}, but the model has {size}: resize its "
            "embeddings, or set chat: transcript in the registry entry"
        )

    def _closes(self) -> Iterator[str]:
        """The text after an assistant's message: at the end, and before another turn."""
        traits = self._traits
        yield traits.close
        if not self.source or traits.fault:
            return
        turns = [_HELLO, {"role": "assistant", "content": _PROBE}, _NEXT]
        try:
            text = self._rendered(_in_parts(turns, traits.in_parts), _NO_PROMPT)
        except TemplateFailed:
            return
        _, probe, after = text.partition(_PROBE)
        between, following, _ = after.partition(_NEXT["content"])
        if probe and following:
            yield between

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any],
    ) -> str:
        """The prompt, with a BREAK in each control token that is not the template's own.

        ``content`` of ``messages`` are texts. Raises InvalidRequest for messages that the template
        refuses, and where their text is not in the prompt.
        """
        if "developer" not in self.source:
            roles = {"developer": "system"}
            messages = [{**m, "role": roles.get(m["role"], m["role"])} for m in messages]
        broken = [self.control.broken(m, m["role"]) for m in messages]
        final = broken[-1]["content"]
        if continue_final_message:
            broken[-1]["content"] = final + _TAG
        variables = {"add_generation_prompt": add_generation_prompt, **self.control.broken(kwargs)}
        if tools:
            variables["tools"] = self.control.broken(tools)
        try:
            text = self._text(broken, variables)
        except TemplateFailed as error:
            raise _refusal(error, bool(kwargs)) from error
        _check_texts(broken, text)
        return _cut(text, final) if continue_final_message else text

    def _text(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        return self._rendered(_in_parts(messages, self._traits.in_parts), variables)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        return renderer.render(
            self.source,
            {
                "tools": None,
                "documents": None,
                "messages": messages,
                **special_tokens(self._tokenizer),
                **variables,
            },
        )

    @cached_property
    def takes_system(self) -> bool:
        """True where a system turn shows."""
        turns = [{"role": "system", "content": _PROBE}, _HELLO]
        return self._shows(_in_parts(turns, self._traits.in_parts))

    @cached_property
    def shows_calls(self) -> bool:
        """True where a call of an earlier turn shows, and the result of it."""
        return self._shows_call({_PROBE: "x"})

    def _shows_call(self, arguments: str | dict[str, str]) -> bool:
        function = {"name": FUNCTIONS[0], "arguments": arguments}
        made = {"id": "c12345678", "type": "function", "function": function}
        turns: list[Mapping[str, Any]] = [
            _HELLO,
            {"role": "assistant", "content": "", "tool_calls": [made]},
            {"role": "tool", "content": _PROBE, "tool_call_id": made["id"]},
        ]
        try:
            text = self._rendered(_in_parts(turns, self._traits.in_parts), _NO_PROMPT)
        except TemplateFailed:
            return False
        return FUNCTIONS[0] in text and _PROBE in text

    @cached_property
    def takes_results(self) -> bool:
        """True where a turn of a tool shows."""
        turns = [_HELLO, {"role": "tool", "content": _PROBE}]
        return self._shows(_in_parts(turns, self._traits.in_parts))

    @cached_property
    def reasoning(self) -> ReasoningStyle | None:
        """The marks around what the model thinks; None where the template knows of none."""
        return derive_reasoning(self._probe, self.source) if self.source else None

    @cached_property
    def call_format(self) -> CallFormat | None:
        """The format of calls; None where the template shows none, or none that reads back."""
        if not self.source:
            return None
        if not (self.shows_tools or self.shows_calls or self._shows_call(f'{{"{_PROBE}": "x"}}')):
            return None
        return derive(self._probe, self.reasoning.close if self.reasoning else "")

    @cached_property
    def shows_tools(self) -> bool:
        """True where the prompt says what tools there are."""
        return FUNCTIONS[0] in (self._probe.render([HELLO], TOOLS, True, {}) or "")

    @cached_property
    def call_example(self) -> str:
        """A call as the model is to write it; only where there is a ``call_format``."""
        style = self.call_format
        if style is None:
            return ""
        text = example(self._probe, style)
        return after_thought(text, self.reasoning.close, len(text)) if self.reasoning else text

    @cached_property
    def answer_openings(self) -> tuple[str, ...]:
        """The headers that a model writes before what it says; mostly none."""
        return answer_openings(self._probe, self.reasoning) if self.source else ()

    @cached_property
    def _probe(self) -> TemplateProbe:
        left_s = _PROBED_S
        texts: dict[bytes, str | None] = {}  # half of the questions come twice

        def render(
            messages: Sequence[Mapping[str, Any]],
            tools: Sequence[Any] | None,
            add_generation_prompt: bool,
            variables: Mapping[str, Any],
        ) -> str | None:
            nonlocal left_s
            prompt = {"add_generation_prompt": add_generation_prompt, "tools": tools, **variables}
            key = orjson.dumps([messages, prompt])
            if key in texts:
                return texts[key]
            if left_s <= 0:
                return None
            began = time.monotonic()
            try:
                texts[key] = self._rendered(messages, prompt)
            except TemplateFailed:
                texts[key] = None
            left_s -= time.monotonic() - began
            return texts[key]

        return TemplateProbe(render)

    @cached_property
    def _traits(self) -> _Traits:
        """Asked of the template once: it costs as much as rendering some requests."""
        if not self.source:
            return _Traits()
        try:
            in_parts = self._roles_in_parts()
        except TemplateFailed as error:
            return _Traits(fault=str(error))
        turns = _in_parts([_HELLO, {"role": "assistant", "content": _PROBE}], in_parts)
        try:
            text = self._rendered(turns, _NO_PROMPT)
        except TemplateFailed:
            text = ""
        _, probe, after = text.rpartition(_PROBE)
        fault = self.missing_token(self.control.ids(text, False))
        return _Traits(fault, in_parts, close=after if probe else "")

    def _roles_in_parts(self) -> frozenset[str]:
        """The roles whose text only shows as a list of parts."""
        roles: frozenset[str] = frozenset()
        for role, before, after in (
            ("user", [], []),
            ("system", [], [_HELLO]),
            ("assistant", [_HELLO], []),
        ):
            turns = [*before, {"role": role, "content": _PROBE}, *after]
            both = roles | {role}
            if not self._shows(_in_parts(turns, roles)) and self._shows(_in_parts(turns, both)):
                roles = both
        return roles | {"tool", "developer"} if "user" in roles else roles

    def _shows(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            text = self._rendered(messages, _NO_PROMPT)
        except TemplateFailed as error:
            if error.kind in ("broken", "limit"):
                raise
            return False
        return _PROBE in text and not _LIST.search(text)


_NO_PROMPT = {"add_generation_prompt": False}
_HELLO = {"role": "user", "content": "hello"}
_NEXT = {"role": "user", "content": "qznextqz"}


def special_tokens(tokenizer: Any) -> dict[str, Any]:
    """The texts of a tokenizer's special tokens, by the names that templates have for them."""
    return {
        name: list(map(str, token)) if isinstance(token, list) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }


def _in_parts(
    messages: Sequence[Mapping[str, Any]], roles: frozenset[str]
) -> Sequence[Mapping[str, Any]]:
    """Those of ``roles`` with one part each: a control token in pieces would join again."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if message["role"] in roles
        else message
        for message in messages
    ]


def _refusal(error: TemplateFailed, has_kwargs: bool) -> InvalidRequest:
    """The client's fault: messages that the template does not take, or what it is told besides."""
    param = "chat_template_kwargs" if has_kwargs and error.kind != "raised" else "messages"
    if error.kind == "limit":
        return InvalidRequest(f"The model's chat template was ended: {error}", param=param)
    text = f"The model's chat template refuses these messages: {error}"
    return InvalidRequest(text, param=param)


def _cut(text: str, final: str) -> str:
    """The prompt up to the end of the final message, which the tag shows."""
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise InvalidRequest(
            "The model's chat template leaves out the final message, which is to be continued",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


def _check_texts(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise InvalidRequest where the longest word of a message is not in the prompt.

    Templates may cut, escape or move what was said, and drop the reasoning of earlier turns; but an
    answer to a conversation without its words is no answer.
    """
    folded = None
    for place, message in enumerate(messages):
        content = (message["content"] or "").rpartition("</think>")[2][:_LOOKED_AT]
        word = max(_WORD.findall(content), key=len, default="")
        if word in text:
            continue
        folded = text.casefold() if folded is None else folded
        if word.casefold() not in folded:
            raise InvalidRequest(
                f"The model's chat template leaves out the text of messages[{place}]",
                param="messages",
            )


def plain(text: str) -> str:
    """A rendered prompt without breaks."""
    return text.replace(BREAK, "")
