"""The dialects of the APIs: how errors look, and how a stream is framed and ends.

Each blueprint has one. A new API is a ``Dialect`` here, or in its own folder and named in
``BY_PREFIX``, a blueprint that has it, and its views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from marshmallow import Schema

from transformers_api import logs
from transformers_api.api.http import sse, strict_json
from transformers_api.api.http.error_schemas import (
    Detail,
    Error,
    Explained,
    Failed,
    MessagesError,
    Refused,
)
from transformers_api.errors import ApiError, InvalidRequest, ThreadUnsupported

Json = dict[str, Any]
OTHER_ERRORS = (
    "Another error: 401 or 403 for the API key, 404, 408, 413, 429 or 503 with `Retry-After`, "
    "500, 504, 507"
)
INVALID = "A field is wrong, or out of range; the text names it"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One API's way to answer."""

    error_body: Callable[[ApiError], Json]  # of an answer that is nothing but an error
    error_schema: type[Schema]
    invalid_status: int = 400  # of an InvalidRequest
    id_headers: tuple[str, ...] = ()  # that have the request's id, besides x-request-id
    statuses: Mapping[int, int] = field(default_factory=dict)  # others than ours
    invalid_schema: type[Schema] | None = None  # None: a wrong request looks like other errors
    quote: str = "'"  # around names of fields in messages
    # A stream: what frames an event (a payload and a name), what shows life, what ends it.
    content_type: str = sse.CONTENT_TYPE
    frame: Callable[..., bytes] = sse.frame
    ping: bytes = sse.PING  # every client skips it; one object, told apart by its identity
    stream_end: bytes = b""  # after the last event; missing where the stream was cut off
    late_error_body: Callable[[ApiError], Json] | None = None  # None: as error_body
    late_error_event: str | None = None  # the name of the event of an error after the first byte

    def status(self, error: ApiError) -> int:
        """The HTTP status of an answer that is ``error``."""
        if isinstance(error, InvalidRequest):
            return self.invalid_status
        return self.statuses.get(error.status, error.status)

    def late_error(self, error: ApiError) -> bytes:
        """The event of an error after the first byte, when the status is out already."""
        body = self.late_error_body or self.error_body
        return self.frame(body(error), self.late_error_event)

    @property
    def documented_errors(self) -> dict[str, tuple[type[Schema], str]]:
        """(schema, description) by status, for the OpenAPI document."""
        others = {"default": (self.error_schema, OTHER_ERRORS)}
        if self.invalid_schema is None:
            return others
        return {str(self.invalid_status): (self.invalid_schema, INVALID), **others}


def ndjson_line(payload: Any, _event: str | None = None) -> bytes:
    """A line of JSON, for whoever reads lines."""
    return sse.in_one_line(strict_json.dump(payload)) + b"\n"


def _openai_error(error: ApiError) -> Json:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def _detail(error: ApiError) -> Json:
    return {"detail": error.message}


def _failure(error: ApiError) -> Json:
    return {"error": error.message, "code": error.code}


def _niels_error(error: ApiError) -> Json:
    """A wrong request is ``detail``, with a code where it has one of its own."""
    if not isinstance(error, InvalidRequest):
        return _failure(error)
    return {"detail": error.message} | ({"code": error.code} if error.code else {})


_MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _messages_error(error: ApiError) -> Json:
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    body: Json = {"type": _MESSAGES_TYPES.get(error.status, other), "message": error.message}
    if isinstance(error, ThreadUnsupported):
        body["details"] = {"error_code": error.code, "unsupported": [error.param]}
    return {"type": "error", "error": body, "request_id": logs.request_id.get()}


OPENAI = Dialect(error_body=_openai_error, error_schema=Error, stream_end=sse.DONE)
LLAMA_CPP = replace(OPENAI, stream_end=b"")  # llama-server's own routes: `stop: true` is the end
# The seeds' own routes, and all that no blueprint is named for.
PLAIN = Dialect(error_body=_detail, error_schema=Detail, stream_end=sse.DONE)
# /chat/stream and /inspect/*, as niels-gpt has them: ``head must be in [0, 3]``.
NIELS = Dialect(
    error_body=_niels_error,
    error_schema=Failed,
    invalid_status=422,
    invalid_schema=Refused,
    quote="",
    late_error_body=_failure,
    late_error_event="error",
)
# /v1/messages, as Anthropic has it; its clients try again after a 529.
MESSAGES = Dialect(
    error_body=_messages_error,
    error_schema=MessagesError,
    id_headers=("Request-Id",),
    statuses={503: 529},
    ping=sse.frame({"type": "ping"}, "ping"),
    late_error_event="error",
)
# /api/*, as Ollama has it: lines of JSON, the last with ``done``.
OLLAMA = Dialect(
    error_body=lambda error: {"error": error.message},
    error_schema=Explained,
    content_type="application/x-ndjson",
    frame=ndjson_line,
    ping=ndjson_line(
        {"done": False, "response": "", "message": {"role": "assistant", "content": ""}}
    ),
)

# Of URLs that are no route, and of requests that never reach the application.
BY_PREFIX = (
    ("/v1", OPENAI),
    ("/v1/messages", MESSAGES),
    ("/api", OLLAMA),
    ("/tokenize", OPENAI),
    ("/detokenize", OPENAI),
    ("/tokenizer_info", OPENAI),
    ("/rerank", OPENAI),
    ("/score", OPENAI),
    ("/apply-template", LLAMA_CPP),
    ("/infill", LLAMA_CPP),
    ("/props", LLAMA_CPP),
    ("/chat/stream", NIELS),
    ("/inspect", NIELS),
)


def by_path(path: str) -> Dialect:
    """The dialect below whose prefix ``path`` lies; of several the one with the longest."""
    matches = [entry for entry in BY_PREFIX if is_below(path, (entry[0],))]
    return max(matches, key=lambda entry: len(entry[0]), default=("", PLAIN))[1]


def is_below(path: str, starts: Iterable[str]) -> bool:
    """True where ``path`` is one of ``starts``, or below one."""
    return any(path == start or path.startswith(f"{start}/") for start in starts)
