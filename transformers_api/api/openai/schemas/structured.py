"""The fields that say what form an answer is to have; ``../structured.py`` reads them."""

from __future__ import annotations

from typing import Any

from marshmallow import fields

from transformers_api.api.http.fields import NOT_GIVEN, AnyObject, Many, Schema, Text
from transformers_api.api.http.sampling_schema import about

SCHEMA = {"oneOf": [{"type": "object"}, {"type": "string"}]}


class Whatever(fields.Raw):
    """A value that is checked later, with the fields beside it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(error_messages=NOT_GIVEN, **options)


class Structured(Schema):
    """At most one of these may ask for a form."""

    response_format = AnyObject(
        **about(
            "`text`, `json_object`, `json_schema`, `regex`, `grammar` or `structural_tag`; the "
            "answer has that form, or ends by its length."
        )
    )
    structured_outputs = AnyObject(
        **about(
            "vLLM's: exactly one of `json`, `regex`, `choice`, `grammar`, `json_object`, "
            "`structural_tag`."
        )
    )
    guided_json = Whatever(**about("A JSON schema, as an object or as text.", **SCHEMA))
    guided_regex = Text(**about("A regular expression that the whole answer matches."))
    guided_choice = Many(Text(), longest=1024, **about("The answers that there may be."))
    guided_grammar = Text(**about("A grammar, GBNF or Lark."))
    grammar = Text(**about("The same (llama.cpp)."))
    json_schema = Whatever(**about("A JSON schema (llama.cpp).", **SCHEMA))
    regex = Text(**about("As `guided_regex` (SGLang)."))
    ebnf = Text(**about("As `guided_grammar` (SGLang)."))
