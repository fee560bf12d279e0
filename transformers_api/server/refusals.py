"""Answers to requests that never reach the application: refused below it, or failed there."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

from gunicorn.http import errors as http_errors  # type: ignore[import-untyped]

from transformers_api import logs
from transformers_api.errors import (
    ApiError,
    EngineFailed,
    HeadersTooLarge,
    InvalidRequest,
    UriTooLong,
)
from transformers_api.server.http_parser import MAX_HEAD_BYTES, RequestHead

OUR_FAULTS = (http_errors.InvalidResponseHeader, http_errors.InvalidResponseHeaderName)
OPENAI = "/v1"  # in whose dialect is answered where no path was sent

log = logging.getLogger(__name__)


def load() -> None:
    """Import what a page needs; the first refusal is made on the main loop, which has no time.

    Only in a worker: one that replaces it may find these modules changed (--reload).
    """
    from transformers_api.api.http import dialects, middleware, request_log, strict_json  # noqa: F401


def page(error: ApiError, head: RequestHead, began: float, origins: tuple[str, ...]) -> bytes:
    """A whole response with ``error``, as the application would give it.

    ``began``: time.monotonic() of the request's first byte. ``origins``: of pages that may read it.
    """
    from transformers_api.api.http import dialects, middleware, request_log, strict_json

    dialect = dialects.by_path(head.path or OPENAI)
    own_id = request_log.id_for(head.field(b"x-request-id"))
    named = logs.request_id.set(own_id)
    body = strict_json.dump(dialect.error_body(error))
    logs.request_id.reset(named)
    status = dialect.status(error)
    fields = {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "X-Request-Id": own_id,
        **dict.fromkeys(dialect.id_headers, own_id),
        "OpenAI-Processing-Ms": round(1000 * (time.monotonic() - began)),
        **middleware.cors_headers(origins, head.field(b"origin")),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} {_phrase(status)}\r\n{lines}\r\n".encode() + body


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # a dialect's own
        return "Unavailable"


def api_error(exc: BaseException) -> ApiError:
    """The error to answer with where gunicorn raises ``exc``."""
    match exc:
        case http_errors.LimitRequestLine():
            return UriTooLong("The request line is too long")
        case http_errors.LimitRequestHeaders():
            return HeadersTooLarge(f"Too many headers, or more than {MAX_HEAD_BYTES} bytes of them")
        case http_errors.ParseException() if not isinstance(exc, OUR_FAULTS):
            return InvalidRequest(f"The request is not HTTP: {str(exc)[:200]}")
        case _:
            log.error("A request failed outside of the application", exc_info=exc)
            return EngineFailed("The server failed to handle the request; its log says more")
