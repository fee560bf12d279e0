"""The way in which a model writes calls, as data: derived from its template, or our own.

A turn with calls is ``[content lead_after_content | lead] core (between core)* tail``. A core is

* ``json``: one object with the name and the arguments, ``{"name": "f", "arguments": {…}}`` or
  ``{"f": {…}}``;
* ``named``: the name, ``mid``, and the arguments as JSON;
* ``tagged``: the name and each argument between literals: ``name open key kv value (sep key kv
  value)* close``, where ``kv_json`` stands for ``kv`` before what is no string, and ``quotes``
  around strings where they are not bare.

The literals are as the template writes them; ``SLOT_ID``, ``SLOT_NAME`` and ``SLOT_COUNT`` in them
stand for an id of the call, for its name and for a number that counts the calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SLOT_ID, SLOT_NAME, SLOT_COUNT = "\0id\0", "\0name\0", "\0count\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """The format of calls. See the module."""

    core: Literal["json", "named", "tagged"]
    lead: str = ""  # before the first call of a turn without content
    lead_after_content: str | None = None  # None: the same
    other_leads: tuple[str, ...] = ()  # that a model writes, too
    between: str | None = None  # None: one call in a turn
    tail: str = ""
    is_indented: bool = False  # JSON on several lines
    # json
    name_key: str = ""  # empty: the name is itself a key
    arguments_key: str = ""
    id_key: str = ""
    keys: tuple[str, ...] = ()  # of the object, in the order of the template
    counter_key: str = ""  # its value counts the calls, from ``counter_start`` on
    counter_start: str | int = 0
    constants: Mapping[str, Any] = field(default_factory=dict)  # other keys of the object
    arguments_are_text: bool = False  # JSON in a string
    # named
    mid: str = ""
    other_mids: tuple[str, ...] = ()  # that a model writes, too
    # tagged
    open: str = ""
    kv: str = ""
    kv_json: str = ""  # empty: as kv
    sep: str = ""
    close: str = ""
    empty: str = ""  # instead of open … close where there are no arguments
    quotes: tuple[str, str] = ("", "")
    sorts_keys: bool = False  # the arguments by their names
    nests_json: bool = False  # objects and lists as JSON, where there are quotes
    true: str = "true"  # as it writes the constants
    false: str = "false"
    null: str = "null"
    # in the history of a conversation
    takes_text: bool = False  # the template wants arguments as text
    content_is_null: bool = False  # it wants null as the content beside calls
    has_short_ids: bool = False  # it insists on ids of nine letters and digits

    @property
    def leads(self) -> tuple[str, ...]:
        """The texts that may stand before the first call, the longest first."""
        leads = {
            self.lead,
            self.lead if self.lead_after_content is None else self.lead_after_content,
            *self.other_leads,
        }
        return tuple(sorted(leads, key=len, reverse=True))


# The form that most open models have met, for templates that show no calls.
OWN_FORMAT = CallFormat(
    core="json",
    lead="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    tail="\n</tool_call>",
    name_key="name",
    arguments_key="arguments",
)
