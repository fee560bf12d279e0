"""From the input of a response to a conversation as chat completions have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from transformers_api.api.http.checked import checked_object, checked_text
from transformers_api.api.openai.conversation import CallIds
from transformers_api.api.openai.structured import constraint_of
from transformers_api.api.openai.tool_input import check_together, chosen, tool_of
from transformers_api.api.responses.format import unsealed
from transformers_api.errors import InvalidRequest, UnsupportedParameter
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.tools.spec import Tool, ToolUse

Json = Mapping[str, Any]
Message = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_USER_PARTS = ("input_text", "input_image", "input_file", "input_audio")
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_RESULTS = ("function_call_output", "custom_tool_call_output")
# Of tools that this server does not run: nothing that a model has to be told.
_SKIPPED = ("_call", "_call_output", "_list_tools", "_approval_request", "_approval_response")
FREE_TEXT: Json = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


def messages_of(items: str | Sequence[Any], before: Sequence[Json] = ()) -> list[Message]:
    """The turns of ``items``, which go on from those ``before``. Raises InvalidRequest."""
    turns: list[Message] = []
    calls = CallIds()
    for turn in before:
        calls.add(turn)
    if isinstance(items, str):
        turns.append({"role": "user", "content": items})
    elif are_parts(items):
        turns.append({"role": "user", "content": _text(items, "input")})
    else:
        thought = ""
        for place, item in enumerate(items):
            where = f"input[{place}]"
            kind = checked_object(item, where).get("type", "message")
            if kind == "reasoning":
                thought = _thought(item, where)
                continue
            _add(turns, item, kind, where, thought, calls)
            thought = ""
    return turns


def are_parts(items: Sequence[Any]) -> bool:
    """True where an input is what a user's message has in it, without the message."""
    kinds = [item.get("type") if isinstance(item, Mapping) else None for item in items]
    return bool(kinds) and all(isinstance(kind, str) and kind in _USER_PARTS for kind in kinds)


def _add(
    turns: list[Message], item: Json, kind: Any, where: str, thought: str, calls: CallIds
) -> None:
    """Add the turn of an item; calls join the assistant's turn before them."""
    if not isinstance(kind, str):
        raise InvalidRequest(f"'{where}.type' must be a string", param=where)
    if kind == "message":
        turns.append(_message(item, where, thought))
    elif kind in _CALLS:
        call = _call(item, _CALLS[kind], where)
        calls.add({"tool_calls": [call]})
        if turns and turns[-1]["role"] == "assistant":
            turns[-1].setdefault("tool_calls", []).append(call)
        else:
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            turns.append(turn | ({"reasoning_content": thought} if thought else {}))
    elif kind in _RESULTS:
        output = _text(item.get("output"), f"{where}.output")
        call_id = checked_text(item.get("call_id"), f"{where}.call_id")
        calls.check(call_id, f"{where}.call_id")
        turns.append({"role": "tool", "content": output, "tool_call_id": call_id})
    elif not kind.endswith(_SKIPPED):
        raise UnsupportedParameter(
            f"'{where}' is an item of type '{kind[:32]}', which is not supported", param=where
        )


def _message(item: Json, where: str, thought: str) -> Message:
    role = item.get("role")
    if role not in ROLES:
        listed = ", ".join(ROLES)
        raise InvalidRequest(f"'{where}.role' must be one of {listed}", param=f"{where}.role")
    message = {"role": role, "content": _text(item.get("content"), f"{where}.content")}
    if thought and role == "assistant":
        message["reasoning_content"] = thought
    return message


def _call(item: Json, field: str, where: str) -> Json:
    name = checked_text(item.get("name"), f"{where}.name")
    written = checked_text(item.get(field), f"{where}.{field}")
    if field == "input":
        written = orjson.dumps({"input": written}).decode()
    return {
        "id": checked_text(item.get("call_id"), f"{where}.call_id"),
        "type": "function",
        "function": {"name": name, "arguments": written},
    }


def _text(value: Any, where: str) -> str:
    """A text, or the texts of parts, one after the other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"'{where}' must be a string or a list of parts", param=where)
    texts = []
    for place, part in enumerate(value):
        name = f"{where}[{place}]"
        kind = checked_object(part, name).get("type")
        if kind == "refusal":
            texts.append(checked_text(part.get("refusal"), f"{name}.refusal"))
        elif kind in _TEXT_PARTS:
            texts.append(checked_text(part.get("text"), f"{name}.text"))
        else:
            raise UnsupportedParameter(
                f"'{name}' is a part of type '{str(kind)[:32]}'; only text is supported", param=name
            )
    return "".join(texts)


def _thought(item: Json, where: str) -> str:
    """The text of a reasoning item: its content, else its summary, else what we have sealed."""
    for field in ("content", "summary"):
        if item.get(field):
            return _text(item[field], f"{where}.{field}")
    sealed = item.get("encrypted_content")
    return unsealed(sealed) if isinstance(sealed, str) else ""


def texts_of(messages: Iterable[Json]) -> list[str]:
    """All text of a conversation, to be counted."""
    texts: list[str] = []
    for message in messages:
        texts.append(message["content"])
        for call in message.get("tool_calls", ()):
            texts += [call["function"]["name"], call["function"]["arguments"]]
    return texts


def tools_of(body: Json) -> tuple[ToolUse | None, frozenset[str]]:
    """The tools that may be called, and the names of those that take free text.

    Tools of other kinds (search, files, …) are run by nobody here: a model is not told of them.
    """
    tools: list[Tool] = []
    free: set[str] = set()
    for place, item in enumerate(body.get("tools") or ()):
        where = f"tools[{place}]"
        kind = checked_object(item, where).get("type")
        if kind == "function":
            tools.append(tool_of(item, where))
        elif kind == "custom":
            tool = tool_of({**item, "parameters": FREE_TEXT}, where)
            tools.append(tool)
            free.add(tool.name)
    check_together(tools, "tools")
    choice = body.get("tool_choice", "auto")
    parallel = body.get("parallel_tool_calls", True)
    return chosen(tuple(tools), choice, "tool_choice", parallel=parallel), frozenset(free)


def form_of(body: Json) -> ConstraintSpec | None:
    """The form of the text: ``text.format``. Raises InvalidRequest."""
    form = (body.get("text") or {}).get("format")
    if form is None:
        return None
    param = "text.format"
    fields = checked_object(form, param)
    if fields.get("type") == "json_schema":  # flat here
        named = {key: fields[key] for key in ("name", "schema", "strict") if key in fields}
        fields = {"type": "json_schema", "json_schema": named}
    try:
        return constraint_of({"response_format": fields})
    except InvalidRequest as error:
        inner = (error.param or "").replace("response_format.json_schema", param)
        inner = inner.replace("response_format", param)
        message = error.message.replace(error.param or "\0", inner)
        raise InvalidRequest(message, param=inner) from None
