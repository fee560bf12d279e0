"""From the blocks of a message request to a conversation as chat completions have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from transformers_api.api.http.checked import checked_object, checked_text
from transformers_api.api.openai.conversation import CallIds
from transformers_api.api.openai.structured import constraint_of
from transformers_api.api.openai.tool_input import check_together, chosen, tool_of
from transformers_api.errors import InvalidRequest, UnsupportedParameter
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.tools.spec import ToolUse

Json = Mapping[str, Any]
Message = dict[str, Any]
ROLES = ("user", "assistant", "system")
_FREE = (None, "custom")  # types of tools that the client runs


def messages_of(system: Any, messages: Sequence[Any]) -> list[Message]:
    """The conversation. Raises InvalidRequest.

    Turns of one role that follow each other are one; a system turn in the middle stands in front of
    what the user says next.
    """
    turns: list[Message] = []
    calls = CallIds()
    aside = ""  # a system turn in the middle
    for place, item in enumerate(messages):
        where = f"messages[{place}]"
        role = checked_object(item, where).get("role")
        if role not in ROLES:
            listed = ", ".join(ROLES)
            raise InvalidRequest(f"'{where}.role' must be one of {listed}", param=f"{where}.role")
        if role == "system":
            aside = _joined(aside, _text(item.get("content"), f"{where}.content"))
            continue
        for turn in _turns(role, item.get("content"), f"{where}.content", calls):
            calls.add(turn)
            if turn["role"] == "user" and aside:
                turn["content"], aside = _joined(aside, turn["content"]), ""
            _add(turns, turn)
    if aside:
        _add(turns, {"role": "user", "content": aside})
    if not turns:
        raise InvalidRequest("'messages' must not be empty", param="messages")
    text = "" if system is None else _text(system, "system")
    return [{"role": "system", "content": text}, *turns] if text else turns


def _turns(role: str, content: Any, where: str, calls: CallIds) -> list[Message]:
    """The turns of one message: results of tools, and what is said."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise InvalidRequest(f"'{where}' must be a string or a list of blocks", param=where)
    turn: Message = {"role": role, "content": ""}
    results: list[Message] = []
    for place, block in enumerate(content):
        name = f"{where}[{place}]"
        match checked_object(block, name).get("type"):
            case "text":
                turn["content"] += checked_text(block.get("text"), f"{name}.text")
            case "tool_use" if role == "assistant":
                turn.setdefault("tool_calls", []).append(_call(block, name))
            case "tool_result" if role == "user":
                results.append(_result(block, name, calls))
            case "thinking" if role == "assistant":
                turn["reasoning_content"] = checked_text(block.get("thinking"), f"{name}.thinking")
            case "redacted_thinking":
                pass
            case kind:
                raise UnsupportedParameter(
                    f"'{name}' is a block of type '{str(kind)[:32]}', which is not supported in "
                    f"messages of the role {role}",
                    param=name,
                )
    is_said = turn["content"] or len(turn) > 2 or not results
    return [*results, turn] if is_said else results


def _call(block: Json, where: str) -> Json:
    arguments = checked_object(block.get("input"), f"{where}.input")
    return {
        "id": checked_text(block.get("id"), f"{where}.id"),
        "type": "function",
        "function": {
            "name": checked_text(block.get("name"), f"{where}.name"),
            "arguments": orjson.dumps(arguments).decode(),
        },
    }


def _result(block: Json, where: str, calls: CallIds) -> Message:
    content = block.get("content", "")
    text = _text(content, f"{where}.content") if content else ""
    if block.get("is_error") is True:
        text = f"Error: {text}"
    call_id = checked_text(block.get("tool_use_id"), f"{where}.tool_use_id")
    calls.check(call_id, f"{where}.tool_use_id")
    return {"role": "tool", "content": text, "tool_call_id": call_id}


def _add(turns: list[Message], turn: Message) -> None:
    """Add a turn, or what it says to one of the same role before it."""
    last = turns[-1] if turns else None
    if last is None or turn["role"] == "tool" or last["role"] != turn["role"]:
        turns.append(turn)
        return
    last["content"] = _joined(last["content"], turn["content"])
    if "tool_calls" in turn:
        last.setdefault("tool_calls", []).extend(turn["tool_calls"])


def tools_of(body: Json) -> ToolUse | None:
    """The tools that may be called; those that Anthropic would run are not shown to a model."""
    tools = tuple(
        tool_of(item, f"tools[{place}]", "input_schema")
        for place, item in enumerate(body.get("tools") or ())
        if checked_object(item, f"tools[{place}]").get("type") in _FREE
    )
    check_together(tools, "tools")
    choice = body.get("tool_choice") or {"type": "auto"}
    kind = checked_object(choice, "tool_choice").get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise InvalidRequest(
            "'tool_choice.type' must be one of auto, any, tool, none", param="tool_choice.type"
        )
    parallel = choice.get("disable_parallel_tool_use") is not True
    allowed = choice if kind == "tool" else kind
    return chosen(tools, allowed, "tool_choice", parallel=parallel)


def form_of(body: Json) -> ConstraintSpec | None:
    """The form of the text: ``output_config.format``. Raises InvalidRequest."""
    form = (body.get("output_config") or {}).get("format")
    if form is None:
        return None
    param = "output_config.format"
    if checked_object(form, param).get("type") != "json_schema":
        raise InvalidRequest(f"'{param}.type' must be json_schema", param=f"{param}.type")
    try:
        return constraint_of({"json_schema": form.get("schema")})
    except InvalidRequest as error:
        message = error.message.replace("'json_schema'", f"'{param}.schema'")
        raise InvalidRequest(message, param=f"{param}.schema") from None


def texts_of(messages: Sequence[Json]) -> list[str]:
    """All text of a conversation, to be counted."""
    calls = [call["function"] for m in messages for call in m.get("tool_calls", ())]
    return [m["content"] for m in messages] + [call["arguments"] for call in calls]


def _text(value: Any, where: str) -> str:
    """A text, or the texts of blocks, one after the other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"'{where}' must be a string or a list of blocks", param=where)
    texts = []
    for place, block in enumerate(value):
        name = f"{where}[{place}]"
        if checked_object(block, name).get("type") != "text":
            kind = str(block.get("type"))[:32]
            raise UnsupportedParameter(
                f"'{name}' is a block of type '{kind}'; only text is supported", param=name
            )
        texts.append(checked_text(block.get("text"), f"{name}.text"))
    return "\n".join(texts)


def _joined(one: str, two: str) -> str:
    return "\n\n".join(filter(None, (one, two)))
