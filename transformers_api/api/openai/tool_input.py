"""The tools of a body, in ``tools`` or the older ``functions``, and which may be called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from transformers_api.api.http.checked import checked_object
from transformers_api.errors import InvalidRequest, UnsupportedParameter
from transformers_api.serving.constraints.json_schema import json_constraint
from transformers_api.serving.tools.spec import NO_PARAMETERS, Tool, ToolUse

Json = Mapping[str, Any]
MAX_TOOLS = 128
MAX_BYTES = 256 << 10  # of all schemas together
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def tool_use(body: Json) -> ToolUse | None:
    """The tools that an answer to ``body`` may call; None where there are none. InvalidRequest."""
    if "functions" in body and "tools" not in body:
        tools = tools_of(body["functions"], "functions", wrapped=False)
        return chosen(tools, body.get("function_call", "auto"), "function_call", parallel=False)
    tools = tools_of(body.get("tools", ()), "tools")
    parallel = body.get("parallel_tool_calls", True)
    return chosen(tools, body.get("tool_choice", "auto"), "tool_choice", parallel=parallel)


def tools_of(items: Sequence[Any], param: str, *, wrapped: bool = True) -> tuple[Tool, ...]:
    """The tools of a list, each in ``function`` where ``wrapped``. Raises InvalidRequest."""
    if len(items) > MAX_TOOLS:
        raise InvalidRequest(f"'{param}' must have at most {MAX_TOOLS} items", param=param)
    tools = []
    for place, item in enumerate(items):
        where = f"{param}[{place}]"
        if wrapped:
            kind = checked_object(item, where).get("type", "function")
            if kind != "function":
                raise UnsupportedParameter(
                    f"'{where}' is a tool of type '{str(kind)[:32]}'; only 'function' is supported",
                    param=where,
                )
            item, where = item.get("function"), f"{where}.function"
        tools.append(tool_of(checked_object(item, where), where))
    check_together(tools, param)
    return tuple(tools)


def tool_of(function: Json, param: str, parameters: str = "parameters") -> Tool:
    """One tool, its schema in the field ``parameters``. Raises InvalidRequest."""
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{param}.name' must have from 1 to 64 letters, digits, _, - or .",
            param=f"{param}.name",
        )
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(
            f"'{param}.description' must be a string", param=f"{param}.description"
        )
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"'{param}.strict' must be true or false", param=f"{param}.strict")
    schema = function.get(parameters)
    if schema is None:
        return Tool(name=name, description=description or "", parameters=dict(NO_PARAMETERS))
    spec = json_constraint(schema, f"{param}.{parameters}", strict=bool(strict))
    checked = orjson.loads(spec.source)
    if checked.setdefault("type", "object") != "object":
        raise InvalidRequest(
            f"'{param}.{parameters}' must be the schema of an object",
            param=f"{param}.{parameters}",
        )
    _check_arguments(checked, f"{param}.{parameters}")
    return Tool(name=name, description=description or "", parameters=checked)


def _check_arguments(schema: Json, param: str) -> None:
    """Raise InvalidRequest where the names of the arguments cannot be read off ``schema``."""
    checked_object(schema.get("properties", {}), f"{param}.properties")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        name = f"{param}.required"
        raise InvalidRequest(f"'{name}' must be a list of strings", param=name)


def check_together(tools: Sequence[Tool], param: str) -> None:
    """Raise InvalidRequest for two tools of one name, and for more than may come together."""
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"'{param}' has two tools named '{twice}'", param=param)
    if sum(len(orjson.dumps(tool.parameters)) for tool in tools) > MAX_BYTES:
        raise InvalidRequest(f"'{param}' has more than {MAX_BYTES} bytes of schemas", param=param)


def chosen(tools: tuple[Tool, ...], choice: Any, param: str, *, parallel: bool) -> ToolUse | None:
    """``tools`` as ``choice`` has it: none, auto, required (any), a name, or those allowed."""
    if choice in ("none", None) or (not tools and choice == "auto"):
        return None
    if not tools:
        raise InvalidRequest(f"'{param}' needs 'tools'", param=param)
    names = {tool.name for tool in tools}
    if choice == "auto":
        return ToolUse(tools=tools, parallel=parallel)
    if choice in ("required", "any"):
        return ToolUse(tools=tools, mode="required", parallel=parallel)
    fields = checked_object(choice, param)
    if fields.get("type") == "allowed_tools":
        return _allowed(tools, fields.get("allowed_tools", fields), param, parallel=parallel)
    name = _name(fields)
    if name not in names:
        raise InvalidRequest(f"'{param}' names no tool of 'tools'", param=param)
    return ToolUse(tools=tools, mode="required", names=frozenset({name}), parallel=False)


def _allowed(tools: tuple[Tool, ...], fields: Any, param: str, *, parallel: bool) -> ToolUse:
    fields = checked_object(fields, param)
    mode, listed = fields.get("mode", "auto"), fields.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        raise InvalidRequest(
            f"'{param}.allowed_tools' must have 'mode' (auto, required) and 'tools', a list",
            param=param,
        )
    names = frozenset(_name(checked_object(item, param)) for item in listed)
    if unknown := names - {tool.name for tool in tools}:
        raise InvalidRequest(
            f"'{param}' names '{min(map(str, unknown))}', which is no tool of 'tools'", param=param
        )
    return ToolUse(tools=tools, mode=mode, names=names, parallel=parallel)


def _name(fields: Json) -> str:
    inner = fields.get("function", fields)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else ""
