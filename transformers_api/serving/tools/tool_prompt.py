"""Tools for models whose template shows none: in the prompt, in a form of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from transformers_api.serving.tools.call_format import OWN_FORMAT
from transformers_api.serving.tools.spec import Tool

Message = Mapping[str, Any]
_INTRODUCTION = (
    "You can call functions. These are the functions, one JSON object per line:\n{tools}\n"
    "To call a function, write exactly this, with its name and its arguments:\n{example}\n"
    "The result comes in the next message. Call a function only where it helps; otherwise answer "
    "in plain text."
)


_EXAMPLE = (
    '<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>'
)


def introduction(tools: Sequence[Tool], example: str = _EXAMPLE) -> str:
    """The text that tells a model of ``tools``, and how to call them: as ``example`` does."""
    lines = (orjson.dumps(tool.as_json["function"]).decode() for tool in tools)
    return _INTRODUCTION.format(tools="\n".join(lines), example=example)


def with_tools(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    *,
    takes_system: bool,
    takes_results: bool = False,
) -> list[dict[str, Any]]:
    """``messages`` with the introduction in front, and with calls and results as text.

    ``content`` of messages are texts. Where the template ``takes_results``, these stay turns of a
    tool.
    """
    turns = as_text(messages, takes_results=takes_results)
    return with_system(turns, introduction(tools), takes_system=takes_system) if tools else turns


def with_system(
    messages: Sequence[Message], text: str, *, takes_system: bool
) -> list[dict[str, Any]]:
    """``messages`` with ``text`` behind what the system says, or before what the user does."""
    turns = [dict(message) for message in messages]
    first = turns[0]["role"] if turns else None
    if first in ("system", "developer"):
        turns[0] = {**turns[0], "content": _joined(turns[0]["content"], text)}
    elif takes_system:
        turns.insert(0, {"role": "system", "content": text})
    else:
        place = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
        if place is None:
            turns.insert(0, {"role": "user", "content": text})
        else:
            turns[place] = {**turns[place], "content": _joined(text, turns[place]["content"])}
    return turns


def as_text(messages: Sequence[Message], *, takes_results: bool = False) -> list[dict[str, Any]]:
    """``messages`` with calls as what the assistant wrote, and results as what the user said."""
    turns: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        turn = {
            key: value
            for key, value in message.items()
            if key not in ("tool_calls", "tool_call_id")
        }
        is_result = message["role"] == "tool" and not takes_results
        if message.get("tool_calls"):
            calls = [_written(call["function"]) for call in message["tool_calls"]]
            turn["content"] = _joined(turn["content"], "\n".join(calls), "\n")
        if is_result:
            turn["role"] = "user"
            turn.pop("name", None)
            turn["content"] = f"<tool_response>\n{turn['content']}\n</tool_response>"
        if is_result and follows_result:  # results of one turn are one turn
            turns[-1]["content"] += "\n" + turn["content"]
        else:
            turns.append(turn)
        follows_result = is_result
    return turns


def _written(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    if isinstance(arguments, str):  # not an object: another model's broken call
        arguments = {"arguments": arguments}
    call = {OWN_FORMAT.name_key: function["name"], OWN_FORMAT.arguments_key: arguments}
    return f"{OWN_FORMAT.lead}{orjson.dumps(call).decode()}{OWN_FORMAT.tail}"


def _joined(one: str, two: str, between: str = "\n\n") -> str:
    return between.join(filter(None, (one, two)))
