"""The form that an answer is to have: from the fields of many servers to one constraint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import flask
import orjson

from transformers_api.api.http.checked import checked_object, checked_text
from transformers_api.errors import InvalidRequest
from transformers_api.serving.constraints.json_schema import (
    ANY_OBJECT,
    json_constraint,
    without_additional_properties,
)
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.constraints.text_grammars import (
    choice_constraint,
    grammar_constraint,
    regex_constraint,
    tags_constraint,
)
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.swap.loaded_model import LoadedModel

Json = Mapping[str, Any]
Reader = Callable[[Any, str], ConstraintSpec | None]
IGNORED = "X-Schema-Ignored"  # the header that lists what of a schema is not enforced
MAX_HEADER = 512  # characters
_NOT_IN_HEADERS = re.compile("[^ -~]")


def constraint_of(body: Json) -> ConstraintSpec | None:
    """The constraint that the fields of ``body`` ask for. Raises InvalidRequest."""
    specs = {
        name: spec
        for name, read in _READERS.items()
        if name in body and (spec := read(body[name], name)) is not None
    }
    if len(specs) > 1:
        first, second = list(specs)[:2]
        raise InvalidRequest(
            f"Only one of '{first}' and '{second}' may say how the answer is formed", param=second
        )
    return next(iter(specs.values()), None)


def constrained(
    request: GenerationRequest,
    model: LoadedModel,
    spec: ConstraintSpec | None,
    *,
    ignore_eos: bool = False,
) -> GenerationRequest:
    """``request`` held to ``spec``. Raises InvalidRequest, ConstraintsUnavailable."""
    if spec is None:
        return request
    compiler = model.compiler
    grammar = compiler.compile(spec)
    tell_ignored(grammar.warnings)
    forbidden = compiler.end_ids if ignore_eos else ()
    return replace(request, constrain=lambda: grammar.start(forbidden=forbidden))


def tell_ignored(warnings: Sequence[str]) -> None:
    """Say in a header of the answer what of a schema is not enforced."""
    if not warnings:
        return
    whole = " ".join("; ".join(warnings).split())
    text = _NOT_IN_HEADERS.sub("?", whole)[:MAX_HEADER]

    def tell(response: flask.Response) -> flask.Response:
        response.headers[IGNORED] = text.strip()
        return response

    flask.after_this_request(tell)


def _response_format(value: Any, param: str) -> ConstraintSpec | None:
    fields, kind = checked_object(value, param), value.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            schema = fields.get("schema")
            return json_constraint(ANY_OBJECT if schema is None else schema, f"{param}.schema")
        case "json_schema":
            return _named_schema(fields, param)
        case "json":
            return json_constraint(fields.get("value"), f"{param}.value")
        case "regex":
            name = "value" if "value" in fields else "pattern"
            return _regex(fields.get(name), f"{param}.{name}")
        case "grammar":
            return _grammar(fields.get("grammar"), f"{param}.grammar")
        case "structural_tag":
            return _tags(fields, param)
    kinds = "text, json_object, json_schema, regex, grammar, structural_tag"
    raise InvalidRequest(f"'{param}.type' must be one of {kinds}", param=f"{param}.type")


def _named_schema(fields: Json, param: str) -> ConstraintSpec:
    """``json_schema`` with the schema one level down, as OpenAI has it, or beside the type."""
    if "json_schema" not in fields and "schema" in fields:
        return json_constraint(fields["schema"], f"{param}.schema")
    param = f"{param}.json_schema"
    named = checked_object(fields.get("json_schema"), param)
    name = named.get("name", "")
    if not isinstance(name, str) or not _is_name(name):
        raise InvalidRequest(
            f"'{param}.name' must have from 1 to 64 letters, digits, _ or -", param=f"{param}.name"
        )
    strict = named.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"'{param}.strict' must be true or false", param=f"{param}.strict")
    return json_constraint(named.get("schema"), f"{param}.schema", strict=bool(strict))


def _is_name(name: str) -> bool:
    return (
        0 < len(name) <= 64
        and name.isascii()
        and name.replace("_", "a").replace("-", "a").isalnum()
    )


def _structured_outputs(value: Any, param: str) -> ConstraintSpec | None:
    """vLLM's: exactly one of six, and options for JSON."""
    fields = checked_object(value, param)
    names = [name for name in _STRUCTURED if fields.get(name) not in (None, False)]
    if len(names) != 1:
        listed = ", ".join(_STRUCTURED)
        raise InvalidRequest(f"'{param}' must have exactly one of {listed}", param=param)
    (name,) = names
    spec = _STRUCTURED[name](fields[name], f"{param}.{name}")
    if spec is None or spec.kind != "json_schema":
        return spec
    if fields.get("disable_additional_properties") is True:
        closed = without_additional_properties(orjson.loads(spec.source))
        spec = replace(spec, source=orjson.dumps(closed).decode())
    whitespace = "" if fields.get("disable_any_whitespace") is True else None
    whitespace = fields.get("whitespace_pattern", whitespace)
    if whitespace is None:
        return spec
    return json_constraint(
        orjson.loads(spec.source),
        spec.param,
        whitespace=checked_text(whitespace, f"{param}.whitespace_pattern"),
    )


def _json(value: Any, param: str) -> ConstraintSpec:
    """A schema as an object, or as text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise InvalidRequest(f"'{param}' is no JSON", param=param) from None
    return json_constraint(value, param)


def _json_object(value: Any, param: str) -> ConstraintSpec:
    if value is not True:
        raise InvalidRequest(f"'{param}' must be true", param=param)
    return json_constraint(ANY_OBJECT, param)


def _regex(value: Any, param: str) -> ConstraintSpec:
    return regex_constraint(checked_text(value, param), param)


def _grammar(value: Any, param: str) -> ConstraintSpec | None:
    return grammar_constraint(checked_text(value, param), param) if value != "" else None


def _choice(value: Any, param: str) -> ConstraintSpec:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"'{param}' must be a list of strings", param=param)
    return choice_constraint(value, param)


def _tags(value: Any, param: str) -> ConstraintSpec:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise InvalidRequest(f"'{param}' is no JSON", param=param) from None
    fields = checked_object(value, param)
    structures, triggers = fields.get("structures"), fields.get("triggers")
    if not isinstance(structures, list) or not all(isinstance(s, Mapping) for s in structures):
        name = f"{param}.structures"
        raise InvalidRequest(f"'{name}' must be a list of objects", param=name)
    if not isinstance(triggers, list) or not all(isinstance(t, str) for t in triggers):
        name = f"{param}.triggers"
        raise InvalidRequest(f"'{name}' must be a list of strings", param=name)
    return tags_constraint(structures, triggers, param)


_STRUCTURED: Mapping[str, Reader] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _json_object,
    "structural_tag": _tags,
}
# OpenAI's, vLLM's, its old ones, llama.cpp's, SGLang's.
_READERS: Mapping[str, Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "grammar": _grammar,
    "json_schema": _json,
    "regex": _regex,
    "ebnf": _grammar,
}
