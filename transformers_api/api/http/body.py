"""Request bodies: reading them, parsing them, loading them into schemas."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NoReturn, cast

import flask
from flask_smorest import Blueprint as SmorestBlueprint  # type: ignore[import-untyped]
from marshmallow import Schema, ValidationError
from webargs.flaskparser import FlaskParser

from transformers_api.api.http import encodings, strict_json
from transformers_api.api.http.auth import View, scope_of
from transformers_api.api.http.dialects import Dialect
from transformers_api.api.http.fields import Refusal
from transformers_api.errors import InvalidRequest, PayloadTooLarge, UnsupportedParameter

MAX_BODY_BYTES = 2 << 20
LARGE_BYTES = 1 << 16  # a body beyond takes its turn
# Large bodies are parsed and validated one after the other: beside eight at once, whose threads
# take the interpreter by turns, everybody else would wait eight times as long for theirs.
_TURN = threading.Lock()


def read(request: flask.Request, most_items: int = strict_json.MOST_ITEMS) -> dict[str, Any]:
    """The JSON object of the body, whatever its content type says.

    curl sends a form's content type unless told otherwise. A web page can send that, or plain
    text, to another site without asking it first: with an Origin the type has to be JSON.
    """
    if not request.is_json and "Origin" in request.headers:
        raise InvalidRequest("Content-Type must be application/json")
    raw = read_bytes(request)
    if not raw.strip():
        raise InvalidRequest("The body is empty; it must be a JSON object")
    value = strict_json.parse(raw, most_items)
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object")
    return value


def read_bytes(request: flask.Request) -> bytes:
    """The body as it was before it was encoded."""
    raw = request.get_data(cache=True)
    if encoding := request.headers.get("Content-Encoding", "").strip().lower():
        raw = encodings.decoded(raw, encoding, request.max_content_length or MAX_BODY_BYTES)
    if request.content_length is None and len(raw) >= (request.max_content_length or 1 << 62):
        # A chunked body is cut at the limit without a word.
        raise PayloadTooLarge(f"The body has more than {request.max_content_length} bytes")
    return raw


def invalid(messages: Any, quote: str = "'") -> InvalidRequest:
    """The first of marshmallow's messages, with the path to the field as ``param``."""
    path, text = _first_leaf(messages)
    kind = UnsupportedParameter if isinstance(text, Refusal) else InvalidRequest
    named = f"{quote}{path}{quote}" if path else "The body"
    return kind(f"{named} {text}", param=path or None)


def _first_leaf(messages: Any) -> tuple[str, str]:
    path = ""
    while True:
        if isinstance(messages, Mapping):
            key, messages = next(iter(messages.items()))
            if isinstance(key, int):
                path += f"[{key}]"
            elif key != "_schema":
                path += f".{key}" if path else key
        elif isinstance(messages, list):
            messages = messages[0]
        else:
            return path, messages


@cache
def _instance(schema: type[Schema]) -> Schema:
    """One for all requests: making it takes longer than loading with it."""
    return schema()


class StrictParser(FlaskParser):
    """webargs with our JSON, and errors in a dialect."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self.DEFAULT_VALIDATION_STATUS = dialect.invalid_status
        self._quote = dialect.quote

    def parse(self, argmap: Any, req: flask.Request | None = None, **options: Any) -> Any:
        """As webargs does; large bodies one after the other."""
        request = req or flask.request
        is_large = len(request.get_data(cache=True)) > LARGE_BYTES  # all of it is awaited
        if not is_large and "Content-Encoding" not in request.headers:
            return super().parse(argmap, request, **options)
        with _TURN:
            return super().parse(argmap, request, **options)

    def _get_schema(self, argmap: Any, req: flask.Request) -> Schema:
        return _instance(argmap)

    def load_json(self, req: flask.Request, schema: Schema) -> Any:
        """The body, with as many items as ``schema`` has a use for."""
        return read(req, getattr(schema, "most_items", strict_json.MOST_ITEMS))

    def handle_error(
        self,
        error: ValidationError,
        req: flask.Request,
        schema: Schema,
        *,
        error_status_code: int | None,
        error_headers: Mapping[str, str] | None,
    ) -> NoReturn:
        """Raise InvalidRequest or UnsupportedParameter."""
        assert isinstance(error.messages, dict)
        refusal = invalid(error.messages["json"], self._quote)  # webargs puts the location around
        raise refusal from None


class Blueprint(SmorestBlueprint):  # type: ignore[misc]
    """flask-smorest's blueprint with strict bodies, types, and a dialect for all its routes."""

    def __init__(self, name: str, import_name: str, *, dialect: Dialect, description: str) -> None:
        super().__init__(name, import_name, description=description)
        self.dialect = dialect
        self.ARGUMENTS_PARSER = StrictParser(dialect)

    def _prepare_response_doc(self, doc: Any, doc_info: Any, **options: Any) -> Any:
        doc = SmorestBlueprint._prepare_response_doc(doc, doc_info, **options)
        for status, (schema, text) in self.dialect.documented_errors.items():
            body = {"application/json": {"schema": schema}}
            doc["responses"][status] = {"description": text, "content": body}
        return doc

    def takes(self, schema: type[Schema], **options: Any) -> Callable[[View], View]:
        """Load the JSON body with ``schema`` and pass it to the view as a dictionary."""
        return cast(Callable[[View], View], self.arguments(schema, **options))

    def documents(self, **operation: Any) -> Callable[[View], View]:
        """Document the view with fields of OpenAPI's operation."""
        return cast(Callable[[View], View], self.doc(**operation))

    def gives(
        self,
        schema: type[Schema] | dict[str, Any] | None = None,
        status: int = 200,
        **options: Any,
    ) -> Callable[[View], View]:
        """Document an answer. What the view returns goes out as it is, not through ``schema``.

        A dictionary is a schema of OpenAPI.
        """
        return cast(
            Callable[[View], View],
            self.alt_response(status, schema=schema, success=status < 400, **options),
        )

    def at(
        self, rule: str, also: Mapping[str, str] = MappingProxyType({}), **options: Any
    ) -> Callable[[View], View]:
        """Register the view for a URL, with its scope in the OpenAPI document.

        ``also``: other URLs that mean the same, with their names in that document.
        """

        def register(view: View) -> View:
            if scope_of(view) == "open":
                view = self.doc(security=[])(view)
            for url, name in also.items():
                self.route(url, endpoint=name, **options)(self.doc(operationId=name)(view))
            view = self.doc(operationId=view.__name__)(view)
            return cast(View, self.route(rule, **options)(view))

        return register
