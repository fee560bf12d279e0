"""Text and messages to prompt ids, and ids back to text."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from transformers_api.errors import ChatUnavailable, InvalidRequest, ModelNotCapable, PromptTooLarge
from transformers_api.serving.models.spec import ChatMode
from transformers_api.serving.text import model_template
from transformers_api.serving.text.model_text import ModelText
from transformers_api.serving.text.tokenization import token_ids
from transformers_api.serving.tools import call_history, tool_prompt
from transformers_api.serving.tools.call_format import CallFormat
from transformers_api.serving.tools.reasoning_style import ReasoningStyle
from transformers_api.serving.tools.spec import Tool

_TAGS = {
    "system": "System",
    "developer": "System",
    "user": "User",
    "assistant": "Assistant",
    "tool": "Tool",
}
# What a model without a template writes when it goes on alone: somebody's next turn. With the
# line break, so that "User:" inside a sentence does not end the answer.
TRANSCRIPT_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")
_RESERVED = frozenset(
    {
        "self",
        "messages",
        "conversation",
        "conversations",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
    }
)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model reads it, and what ends its answer besides the model's own."""

    ids: list[int]
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    text: str = ""
    strips_blank: bool = False  # the blank after "Assistant:" is the answer's first, not its text


def encode(
    model: ModelText,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] = (),
    hint: str = "",
    max_bytes: int | None = None,
) -> ChatPrompt:
    """The prompt for ``messages``, by the model's template or as a transcript.

    ``tools`` are shown by the template, or in a form of our own where it shows none. ``hint``: what
    the system is to say besides.

    ``add_generation_prompt`` None: unless the final message is continued. ``max_bytes``: of the
    prompt as the model reads it, before it becomes ids. Raises ChatUnavailable where the registry
    says so, InvalidRequest for messages that the template refuses, PromptTooLarge.
    """
    mode = chat_mode(model)
    if mode == "off":
        raise unavailable()
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    elif continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message needs an assistant message at the end of messages",
            param="continue_final_message",
        )
    kwargs = chat_template_kwargs or {}
    turns = add_generation_prompt, continue_final_message
    text = _render(model, messages, *turns, kwargs, tools, hint)
    plain = model_template.plain(text)
    if max_bytes is not None:
        check_bytes(plain, max_bytes)
    _check_unicode(text, "messages")
    if mode == "transcript":
        ids, strips_blank = model.template.control.ids(text, True), add_generation_prompt
        return ChatPrompt(ids, TRANSCRIPT_STOPS, text=plain, strips_blank=strips_blank)
    ids = model.template.control.ids(text, False)
    if fault := model.template.missing_token(ids):  # written in this conversation only
        raise _unusable(model, fault)
    return ChatPrompt(ids, _written_stops(model.tokenizer), model.end_of_turn, plain)


def render(
    model: ModelText,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] = (),
    hint: str = "",
) -> str:
    """The text that ``encode`` makes ids of. Raises InvalidRequest."""
    kwargs = chat_template_kwargs or {}
    return model_template.plain(
        _render(model, messages, add_generation_prompt, continue_final_message, kwargs, tools, hint)
    )


def call_format(model: ModelText) -> CallFormat | None:
    """The format in which the template of ``model`` writes calls; None where it shows none."""
    if chat_mode(model) != "template" or model.spec.tools == "prompt":
        return None
    return model.template.call_format


def reasoning_style(model: ModelText) -> ReasoningStyle | None:
    """The marks of thoughts by the registry, else by the template; None where there are none."""
    derived = model.template.reasoning if chat_mode(model) == "template" else None
    if model.spec.reasoning is not None:
        opening, close = model.spec.reasoning
        return ReasoningStyle(
            open=opening, close=close, has_switch=bool(derived and derived.has_switch)
        )
    return derived


def check_bytes(text: str, most: int) -> None:
    """Raise PromptTooLarge for a prompt of more than ``most`` bytes."""
    if (size := len(text.encode(errors="replace"))) > most:
        raise PromptTooLarge(f"Prompt too large: {size} bytes (max {most})")


def unavailable() -> ChatUnavailable:
    """The error for a model whose registry entry has ``chat: off``."""
    return ChatUnavailable(
        "Chat completions are currently disabled; please use /v1/completions instead."
    )


def chat_mode(model: ModelText) -> ChatMode:
    """The registry's word; without one, a template where the tokenizer has one."""
    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    mode: ChatMode = model.spec.chat or ("template" if has_template else "transcript")
    if mode == "template" and not has_template:
        raise ModelNotCapable(f"Model '{model.spec.name}' has no chat template", param="model")
    if mode == "template" and (fault := model.template.fault):
        raise _unusable(model, fault)
    return mode


def _unusable(model: ModelText, fault: str) -> ModelNotCapable:
    return ModelNotCapable(
        f"Model '{model.spec.name}' has a chat template that cannot be used: {fault}",
        param="model",
    )


def transcript(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, continue_final: bool
) -> str:
    r"""``System: …\nUser: …\nAssistant:``, for models that have never seen a chat template."""
    for message in messages:
        if message["role"] not in _TAGS:
            raise InvalidRequest(f"Unknown role '{message['role']}'", param="messages")
    text = "".join(f"{_TAGS[message['role']]}: {message['content']}\n" for message in messages)
    if continue_final:
        return text[:-1]
    return text + "Assistant:" if add_generation_prompt else text


def _written_stops(tokenizer: Any) -> tuple[str, ...]:
    """The plain texts that end an answer, where the model has no token for that."""
    return tuple(getattr(tokenizer, "init_kwargs", {}).get("stop_strings") or ())


def encode_text(
    model: ModelText, text: str, add_special_tokens: bool = True, param: str = "prompt"
) -> list[int]:
    """The ids of a plain text. Raises InvalidRequest(``param``) for text that is not Unicode."""
    return _tokenize(model.tokenizer, text, add_special_tokens, param)


def decode_ids(model: ModelText, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of ``ids``, each of which must be in the vocabulary."""
    text = model.tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return str(text)


def _check_variables(kwargs: Mapping[str, Any]) -> None:
    """Template variables may come with a request, but never a template or a way around it."""
    for name in kwargs:
        if name in _RESERVED or name.startswith(("return_", "_")):
            raise InvalidRequest(
                f"chat_template_kwargs must not set '{name}'", param="chat_template_kwargs"
            )


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts put together."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _tool_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """The calls of an earlier answer, with arguments as templates read them: not as text."""
    calls = message.get("tool_calls")
    if not calls:
        return {}
    return {
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": _arguments(call["function"])}}
            for call in calls
        ]
    }


def _thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """The reasoning of an earlier answer, by all the names that templates have for it."""
    names = ("reasoning_content", "reasoning", "thinking")
    text = next((message[name] for name in names if message.get(name)), None)
    return {} if text is None else dict.fromkeys(names, text)


def _arguments(function: Mapping[str, Any]) -> Any:
    try:
        arguments = orjson.loads(function["arguments"])
        orjson.dumps(arguments)  # it reads what nests deeper than it writes
    except (ValueError, TypeError):
        return function["arguments"]
    return arguments if isinstance(arguments, dict) else function["arguments"]


def _render(
    model: ModelText,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    continue_final_message: bool,
    kwargs: Mapping[str, Any],
    tools: Sequence[Tool],
    hint: str,
) -> str:
    """The prompt, with a break in each control token that somebody typed."""
    _check_variables(kwargs)
    texts = [
        {**message, "content": content_text(message), **_tool_calls(message), **_thought(message)}
        for message in messages
    ]
    mode = chat_mode(model)
    if hint:
        texts = tool_prompt.with_system(texts, hint, takes_system=_takes_system(model))
    chat = _Conversation(texts)
    if tools or any(message["role"] == "tool" or "tool_calls" in message for message in texts):
        chat = _with_tools(model, texts, tools)
    if mode == "transcript":
        broken = [model.template.control.broken(message) for message in chat.messages]
        return transcript(broken, add_generation_prompt, continue_final_message)
    text = model.template.render(
        chat.messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=chat.tools,
        kwargs=kwargs,
    )
    return text.replace(chat.place, chat.example) if chat.place else text


@dataclass(frozen=True, slots=True)
class _Conversation:
    """A conversation as a template takes it; ``example`` goes to ``place`` in its text."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None  # that the template shows
    place: str = ""
    example: str = ""


def _with_tools(
    model: ModelText,
    texts: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
) -> _Conversation:
    """``texts`` with tools, calls and results in the way that the model reads them."""
    style, template = call_format(model), model.template
    is_transcript = chat_mode(model) == "transcript"
    if style is not None and (template.shows_tools or not tools):
        return _Conversation(call_history.in_style(texts, style), [tool.as_json for tool in tools])
    if style is not None:  # shown by us: what is in our example are control tokens, in texts not
        place = f"zq{secrets.token_hex(8)}"
        text = tool_prompt.introduction(tools, place)
        turns = call_history.in_style(texts, style)
        turns = tool_prompt.with_system(turns, text, takes_system=_takes_system(model))
        return _Conversation(turns, place=place, example=template.call_example)
    if not tools and not is_transcript and template.shows_calls:
        return _Conversation(texts)  # a history that the template writes in its own way
    return _Conversation(
        tool_prompt.with_tools(
            texts,
            tools,
            takes_system=_takes_system(model),
            takes_results=is_transcript or template.takes_results,
        )
    )


def _takes_system(model: ModelText) -> bool:
    return chat_mode(model) == "transcript" or model.template.takes_system


def _tokenize(tokenizer: Any, text: str, add_special_tokens: bool, param: str) -> list[int]:
    _check_unicode(text, param)
    return token_ids(tokenizer, text, add_special_tokens=add_special_tokens)


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} holds half of a surrogate pair, which is not text", param=param
        ) from error
