"""Calls of a conversation so far, as the template of a model wants to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from transformers_api.serving.tools.call_format import CallFormat

_SHORT = 9  # letters and digits of an id, where a template insists


def in_style(messages: Sequence[Mapping[str, Any]], style: CallFormat) -> list[dict[str, Any]]:
    """``messages`` with arguments as objects or as text, and ids of the length that is wanted.

    Arguments of another model that are no JSON object are kept in one named ``arguments``.
    """
    return [_message(message, style) for message in messages]


def _message(message: Mapping[str, Any], style: CallFormat) -> dict[str, Any]:
    changed = dict(message)
    if "tool_call_id" in changed:
        changed["tool_call_id"] = _id(changed["tool_call_id"], style)
    calls = changed.get("tool_calls")
    if calls:
        changed["tool_calls"] = [_call(call, style) for call in calls]
        if style.content_is_null and not changed["content"]:
            changed["content"] = None
    return changed


def _call(call: Mapping[str, Any], style: CallFormat) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str) and not style.takes_text:
        arguments = {"arguments": arguments}
    elif not isinstance(arguments, str) and style.takes_text:
        arguments = orjson.dumps(arguments).decode()
    return {
        **call,
        "id": _id(str(call.get("id", "call")), style),
        "function": {**function, "arguments": arguments},
    }


def _id(text: str, style: CallFormat) -> str:
    if not style.has_short_ids:
        return text
    letters = "".join(filter(str.isalnum, text))
    return letters[-_SHORT:].rjust(_SHORT, "0")
