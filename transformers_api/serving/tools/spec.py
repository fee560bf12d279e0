"""The tools of a request, and the parts of an answer to it. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

NO_PARAMETERS: Mapping[str, Any] = MappingProxyType(
    {"type": "object", "properties": {}, "additionalProperties": False}
)
MOST_CALLS = 16  # of one answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the client offers; ``parameters`` is a JSON schema of an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(NO_PARAMETERS))

    @property
    def as_json(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a request, and which of them the answer may or must call."""

    tools: tuple[Tool, ...]
    mode: Literal["auto", "required"] = "auto"
    names: frozenset[str] = frozenset()  # that may be called; empty: all
    parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return tuple(tool for tool in self.tools if not self.names or tool.name in self.names)


@dataclass(slots=True)
class Reasoning:
    """The next piece of what the model thinks before it answers."""

    text: str


@dataclass(slots=True)
class Content:
    """The next piece of what it says."""

    text: str


@dataclass(slots=True)
class CallStart:
    """A call begins: the ``index``-th of the answer."""

    index: int
    name: str


@dataclass(slots=True)
class CallArguments:
    """The next piece of the arguments of a call; all pieces together are JSON."""

    index: int
    text: str


Part = Reasoning | Content | CallStart | CallArguments
