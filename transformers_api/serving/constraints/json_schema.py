"""A client's JSON schema: bounded before anything is compiled, and as one text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from transformers_api.errors import ConstraintRefused, InvalidRequest
from transformers_api.serving.constraints.spec import ConstraintSpec

MAX_BYTES = 128 << 10  # of one schema
MAX_DEPTH = 48
MAX_NODES = 20_000
MAX_ENUM_VALUES = 20_000  # of all enums of a schema
MAX_PROPERTIES = 500  # of one object: twice as many are too complex where all are optional
MAX_PATTERN = 4 << 10  # characters
MAX_WHITESPACE = 64  # characters of the pattern
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_ENDLESS = re.compile(r"[*+]|\{\d*,\}")


def json_constraint(
    schema: Any,
    param: str,
    *,
    strict: bool = False,
    whitespace: str | None = None,
) -> ConstraintSpec:
    """The constraint of answers that are JSON by ``schema``, an object. Raises InvalidRequest.

    ``whitespace``: a pattern of what may stand between tokens of JSON. One without an upper bound
    is refused: a model may write spaces for ever.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"'{param}' must be an object", param=param)
    _check_bounds(schema, param)
    # The compiler takes its options from that keyword; they are not the client's to set.
    source = orjson.dumps({key: schema[key] for key in schema if key != "x-guidance"})
    if len(source) > MAX_BYTES:
        raise _too_large(param, f"more than {MAX_BYTES} bytes")
    if whitespace is not None and (len(whitespace) > MAX_WHITESPACE or _ENDLESS.search(whitespace)):
        raise InvalidRequest(
            "'whitespace_pattern' must be a short pattern with an upper bound, such as [ ]?",
            param="structured_outputs.whitespace_pattern",
        )
    return ConstraintSpec(
        kind="json_schema",
        source=source.decode(),
        param=param,
        strict=strict,
        whitespace=whitespace,
    )


def without_additional_properties(schema: Any) -> Any:
    """``schema`` where every object that lists its properties has no others."""
    if isinstance(schema, list):
        return [without_additional_properties(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed = {key: without_additional_properties(value) for key, value in schema.items()}
    if "properties" in changed:
        changed.setdefault("additionalProperties", False)
    return changed


def _check_bounds(schema: Mapping[str, Any], param: str) -> None:
    """Raise InvalidRequest for more than is compiled; not recursive, for it may be deep."""
    nodes = values = 0
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        node, depth = waiting.pop()
        nodes += 1
        if depth > MAX_DEPTH:
            raise _too_large(param, f"more than {MAX_DEPTH} levels")
        if isinstance(node, list):
            waiting += [(item, depth + 1) for item in node]
        elif isinstance(node, Mapping):
            values += _count(node.get("enum"))
            properties = _count(node.get("properties"))
            if properties > MAX_PROPERTIES:
                raise _too_large(param, f"an object with more than {MAX_PROPERTIES} properties")
            pattern = node.get("pattern")
            if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
                raise _too_large(param, f"a pattern of more than {MAX_PATTERN} characters")
            waiting += [(item, depth + 1) for item in node.values()]
        if nodes + len(waiting) > MAX_NODES + values:
            raise _too_large(param, f"more than {MAX_NODES} parts")
        if values > MAX_ENUM_VALUES:
            raise _too_large(param, f"more than {MAX_ENUM_VALUES} values of enums")


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list | Mapping) else 0


def _too_large(param: str, excess: str) -> ConstraintRefused:
    return ConstraintRefused(f"'{param}' has {excess}", param=param)
