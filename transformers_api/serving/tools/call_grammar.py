"""From a format and the tools of a request to the grammar of calls, in llguidance's Lark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from transformers_api.errors import InvalidRequest
from transformers_api.serving.text.common_prefix import common_prefix
from transformers_api.serving.tools.call_format import (
    SLOT_COUNT,
    SLOT_ID,
    SLOT_NAME,
    CallFormat,
)
from transformers_api.serving.tools.spec import MOST_CALLS, Tool

MAX_SOURCE = 2 << 20  # characters of all rules: where arguments refer, each has all schemas
_ID = "ID: /[A-Za-z0-9]{9}/"
_COUNT = "COUNT: /[0-9]{1,3}/"
_ESCAPED = re.compile(r"(?s:\\.)|[/\n\r\\]")
_WRITTEN = {"/": "\\/", "\n": "\\n", "\r": "\\r"}
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")  # no schemas, whatever is in them
_SPACE = "SPACE: /[ \\n\\t]{0,4}/"
# Of JSON in a call: at most one space between its tokens; keywords that are not known are left out.
_OPTIONS = {
    "x-guidance": {
        "whitespace_flexible": False,
        "item_separator": ", ?",
        "key_separator": ": ?",
        "lenient": True,
    }
}
_INDENTED = {
    "x-guidance": {
        "whitespace_flexible": True,
        "whitespace_pattern": r"[ \n]{0,40}",
        "lenient": True,
    }
}


class CallGrammar:
    """The rules of calls of ``tools``; ``special`` gives the ids of tokens that no text spells."""

    def __init__(
        self,
        style: CallFormat,
        tools: Sequence[Tool],
        special: Mapping[str, int],
        *,
        parallel: bool = True,
    ) -> None:
        self._style = style
        self._tools = tools
        self._special = special
        texts = sorted(special, key=len, reverse=True)
        self._slots = re.compile("|".join(map(re.escape, [SLOT_ID, SLOT_NAME, SLOT_COUNT, *texts])))
        self._parallel = parallel

    def source(
        self, *, leads: Sequence[str], answer: str | None = None, is_loose: bool = False
    ) -> str:
        """The grammar of calls behind one of ``leads``, or of that or ``answer``, a rule body.

        ``is_loose``: other white space than the template's may follow the lead. One token may hold
        the end of a lead and the beginning of a call: it is too late then to ask for a line break.
        """
        style = self._style
        calls = "call"
        if style.between is not None and self._parallel:
            calls = f"call ({self._literal(style.between)} call){{0,{MOST_CALLS - 1}}}"
        begin = self._either(leads)
        if is_loose:
            begin = self._joined(self._either([lead.rstrip() for lead in leads]), "SPACE")
        turn = self._joined(begin, calls, self._literal(style.tail))
        names = " | ".join(f"call{place}" for place in range(len(self._tools)))
        rules = [
            f"start: {turn}" if answer is None else f"start: {answer} | turn",
            *([] if answer is None else [f"turn: {turn}"]),
            f"call: {names}",
            _ID,
            _COUNT,
            _SPACE,
        ]
        for place, tool in enumerate(self._tools):
            rules += self._call(place, tool)
        if sum(map(len, rules)) > MAX_SOURCE:
            raise InvalidRequest("The schemas of 'tools' are too large together", param="tools")
        return "\n".join(rules)

    def _call(self, place: int, tool: Tool) -> list[str]:
        style = self._style
        if style.core == "json":
            return [f"call{place}: {self._json(self._object(tool))}"]
        name = _quoted(tool.name)
        if style.core == "named":
            mid = self._either((style.mid, *style.other_mids), tool.name)
            body = self._joined(name, mid, self._json(tool.parameters))
            return [f"call{place}: {body}"]
        return _Tagged(self, style, place, tool).rules()

    def _json(self, schema: Mapping[str, Any]) -> str:
        return in_json(schema, _INDENTED if self._style.is_indented else _OPTIONS)

    def _object(self, tool: Tool) -> dict[str, Any]:
        style = self._style
        place = _pointer("properties", style.arguments_key if style.name_key else tool.name)
        parameters = moved(tool.parameters, place)
        if not style.name_key:
            properties: dict[str, Any] = {tool.name: parameters}
        else:
            # Where the template writes them as text, too: what is in a string cannot be held.
            properties = {
                style.name_key: {"const": tool.name},
                **{key: {"const": value} for key, value in style.constants.items()},
                style.arguments_key: parameters,
            }
            if style.id_key:
                properties[style.id_key] = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
            if style.counter_key:
                is_number = isinstance(style.counter_start, int)
                properties[style.counter_key] = (
                    {"type": "integer", "minimum": 0, "maximum": 999}
                    if is_number
                    else {"type": "string", "pattern": "^[0-9]{1,3}$"}
                )
            properties = {key: properties[key] for key in style.keys or properties}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def _literal(self, text: str, name: str = "") -> str:
        """``text`` as a sequence of literals, special tokens and slots; empty for an empty one."""
        parts, at = [], 0
        for match in self._slots.finditer(text):
            parts.append(_quoted(text[at : match.start()]))
            at = match.end()
            if match[0] == SLOT_ID:
                parts.append("ID")
            elif match[0] == SLOT_COUNT:
                parts.append("COUNT")
            elif match[0] == SLOT_NAME:
                parts.append(_quoted(name))
            else:
                parts.append(f"<[{self._special[match[0]]}]>")
        return self._joined(*parts, _quoted(text[at:]))

    def _either(self, texts: Sequence[str], name: str = "") -> str:
        bodies = [self._literal(text, name) or '""' for text in dict.fromkeys(texts)]
        if len(bodies) > 1:
            return f"({' | '.join(bodies)})"
        return "" if bodies == ['""'] else bodies[0]

    @staticmethod
    def _joined(*parts: str) -> str:
        return " ".join(filter(None, parts))


class _Tagged:
    """The rules of one tool whose arguments stand between literals."""

    def __init__(self, grammar: CallGrammar, style: CallFormat, place: int, tool: Tool) -> None:
        self._grammar = grammar
        self._style = style
        self._place = place
        self._tool = tool
        self._properties = self._ordered(_mapping(tool.parameters.get("properties")))
        self._required = frozenset(tool.parameters.get("required") or ())
        # The text that ends any bare value, and any text.
        shared = common_prefix(style.sep, style.close)
        self._end = "" if style.quotes[1] else self._plain(style.sep[:shared])
        self._text_end = self._plain(style.quotes[1]) if style.quotes[1] else self._end

    def _ordered(self, properties: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._style.sorts_keys:
            return properties
        return dict(sorted(properties.items(), key=lambda item: item[0].lower()))

    def _plain(self, text: str) -> str:
        """The beginning of a literal that is text, before any special token."""
        first = self._grammar._slots.search(text)
        return text if first is None else text[: first.start()]

    def rules(self) -> list[str]:
        style, place, literal = self._style, self._place, self._grammar._literal
        joined, keys = self._grammar._joined, list(self._properties)
        rules = []
        for at, key in enumerate(keys):
            rules += self._argument(at, key)
        for at, key in enumerate(keys):
            sep = style.sep.removeprefix(self._end)
            here = joined(literal(sep), f"arg{place}_{at}", f"rest{place}_{at + 1}")
            skip = "" if key in self._required else f" | rest{place}_{at + 1}"
            rules.append(f"rest{place}_{at}: {here}{skip}")
        rules.append(f'rest{place}_{len(keys)}: ""')
        bodies, may_be_empty = [], True
        for at, key in enumerate(keys):
            rest = f"arg{place}_{at} rest{place}_{at + 1}"
            close = style.close.removeprefix(self._end)
            bodies.append(joined(literal(style.open), rest, literal(close)))
            if key in self._required:
                may_be_empty = False
                break
        if may_be_empty:
            bodies.append(literal(style.empty) or '""')
        name = _quoted(self._tool.name)
        return [*rules, f"call{place}: {name} ({' | '.join(bodies)})"]

    def _argument(self, at: int, key: str) -> list[str]:
        style, grammar = self._style, self._grammar
        schema = _mapping(self._properties[key])
        if _refers(schema):
            schema = _apart(self._tool.parameters, key)
        name = f"arg{self._place}_{at}"
        first = grammar._joined(_quoted(key), "")
        if is_text(schema):
            value, extra = self._text(f"STR{self._place}_{at}", schema)
            kv = style.kv
        else:
            value = grammar._joined(self._other(schema), grammar._literal(self._end))
            extra, kv = [], style.kv_json or style.kv
        return [f"{name}: {grammar._joined(first, grammar._literal(kv), value)}", *extra]

    def _text(self, terminal: str, schema: Mapping[str, Any]) -> tuple[str, list[str]]:
        style, literal = self._style, self._grammar._literal
        before, after = map(literal, style.quotes)
        values = schema["enum"] if isinstance(schema.get("enum"), list) else []
        if values or "const" in schema:
            values = values or [schema["const"]]
            texts = " | ".join(_quoted(str(value)) for value in values)
            return self._grammar._joined(before, f"({texts})", after, literal(self._end)), []
        low, high = _size(schema, "minLength", 0), _size(schema, "maxLength", "")
        # A terminal takes what it can: with the end in it, and no other before that, it ends there.
        end = _pattern(self._text_end)
        body = f"{terminal}: /{self._character()}{{{low},{high}}}{end}/"
        if inner := _pattern(self._text_end.strip() or self._text_end):
            body += rf" & ~/(?s:.*){inner}(?s:.*){inner}(?s:.*)/"
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            body += f" & {between_slashes(_anchored(pattern) + end)}"
        after = literal(style.quotes[1].removeprefix(self._text_end))
        return self._grammar._joined(before, terminal, after), [body]

    def _character(self) -> str:
        """A pattern for a character of a text: none with which an end begins, where they differ."""
        if self._text_end or self._style.quotes[1]:
            return "(?s:.)"
        first = {end[0] for end in (self._style.sep, self._style.close) if self._plain(end)}
        return f"[^{''.join(map(_pattern, sorted(first)))}]" if first else "(?s:.)"

    def _other(self, schema: Mapping[str, Any]) -> str:
        style = self._style
        if schema.get("type") == "boolean" and style.true != "true":
            return f"({_quoted(style.true)} | {_quoted(style.false)})"
        is_nested = schema.get("type") in ("object", "array")
        if style.quotes[0] and is_nested and not style.nests_json:
            return self._written(schema)
        return in_json(schema)

    def _written(self, schema: Mapping[str, Any]) -> str:
        """A value with the template's own quotes, and keys without any."""
        before, after = map(self._grammar._literal, self._style.quotes)
        match schema.get("type"):
            case "object":
                items = [
                    f"{_quoted(key + ':')} {self._written(_mapping(value))}"
                    for key, value in self._ordered(_mapping(schema.get("properties"))).items()
                ]
                return self._grammar._joined('"{"', ' "," '.join(items), '"}"')
            case "array":
                item = self._written(_mapping(schema.get("items")) or {"type": "string"})
                most = max(min(int(_size(schema, "maxItems", 64)), 64), 1)
                return f'"[" ({item} ("," {item}){{0,{most - 1}}})? "]"'
            case "string":
                longest = _size(schema, "maxLength", 4096)
                first = self._plain(self._style.quotes[1])[:1]
                character = f"[^{_pattern(first)}]" if first else "(?s:.)"
                return self._grammar._joined(before, f"/{character}{{0,{longest}}}/", after)
        return in_json(schema)


def is_text(schema: Mapping[str, Any]) -> bool:
    """True where a value is written as it is, without the quotes of JSON."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def in_json(schema: Mapping[str, Any], options: Mapping[str, Any] = _OPTIONS) -> str:
    """The body of a rule: a value by ``schema``, in JSON."""
    return f"%json {orjson.dumps({**schema, **options}).decode()}"


def moved(schema: Any, place: str) -> Any:
    """``schema`` with its references as they are once it stands at ``place`` of another one."""
    return _moved(schema, place) if _refers(schema) else schema


def _moved(schema: Any, place: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            changed[key] = f"#{place}{value[1:]}"
        elif key in _NAMED and isinstance(value, Mapping):
            changed[key] = {name: _moved(item, place) for name, item in value.items()}
        else:
            changed[key] = value if key in _VALUES else _moved(value, place)
    return changed


def _apart(parameters: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The schema of one argument by itself, with what its references need."""
    whole = moved(parameters, _pointer("$defs", "all"))
    return {"$ref": f"#{_pointer('$defs', 'all', 'properties', key)}", "$defs": {"all": whole}}


def _refers(schema: Any) -> bool:
    return b'"$ref":"#' in orjson.dumps(schema)


def _pointer(*names: str) -> str:
    """The place of ``names``, one in the other, as a JSON pointer."""
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


def _quoted(text: str) -> str:
    return orjson.dumps(text).decode() if text else ""


def _pattern(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _mapping(value: Any) -> Mapping[str, Any]:
    """A schema, or what is in one; nothing where it is of another type."""
    return value if isinstance(value, Mapping) else {}


def _size(schema: Mapping[str, Any], keyword: str, default: int | str) -> int | str:
    """The bound that a keyword sets; ``default`` where it sets none."""
    size = schema.get(keyword)
    return size if type(size) is int and size >= 0 else default


def _anchored(pattern: str) -> str:
    """A schema's pattern, which may match anywhere, as one that matches the whole."""
    before = "" if pattern.startswith("^") else "(?s:.*)"
    inside, after = pattern.removeprefix("^"), "(?s:.*)"
    escapes = len(inside[:-1]) - len(inside[:-1].rstrip("\\"))
    if inside.endswith("$") and escapes % 2 == 0:
        inside, after = inside[:-1], ""
    return f"{before}({inside}){after}"


def between_slashes(pattern: str) -> str:
    """A regular expression as a terminal, which neither a slash nor a line break may end."""
    return f"/{_ESCAPED.sub(_as_terminal, pattern)}/"


def _as_terminal(match: re.Match[str]) -> str:
    character = match[0][-1]
    if character in _WRITTEN:
        return _WRITTEN[character]
    return match[0] if len(match[0]) > 1 else "\\\\"  # alone at the end
