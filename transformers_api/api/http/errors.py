"""How errors look on the wire: the one place that renders them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from transformers_api.api.http import request_log
from transformers_api.errors import (
    ApiError,
    EngineFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
)

log = logging.getLogger(__name__)

OPENAI_ROUTES = ("/v1", "/tokenize", "/detokenize")
INSPECTION_ROUTES = ("/chat/stream", "/inspect")  # in the dialect of niels-gpt


def payload(error: ApiError, path: str) -> dict[str, Any]:
    """The body in the dialect of the route.

    OpenAI's error object; where one looks inside ``{"error": text, "code": …}``, but for a wrong
    request, which is ``{"detail": text}`` as on all other routes.
    """
    if is_below(path, OPENAI_ROUTES):
        return {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
            }
        }
    if not is_below(path, INSPECTION_ROUTES):
        return {"detail": error.message}
    if not isinstance(error, InvalidRequest):
        return failure(error)
    return {"detail": error.message} | ({"code": error.code} if error.code else {})


def failure(error: ApiError) -> dict[str, Any]:
    """The text and the code: also how a stream of named events ends early."""
    return {"error": error.message, "code": error.code}


def status(error: ApiError, path: str) -> int:
    """A wrong request is 422 where one looks inside, 400 elsewhere."""
    wrong = isinstance(error, InvalidRequest) and is_below(path, INSPECTION_ROUTES)
    return 422 if wrong else error.status


def is_below(path: str, starts: Iterable[str]) -> bool:
    """Whether a route is one of ``starts``, or below one."""
    return any(path == start or path.startswith(f"{start}/") for start in starts)


def render(error: ApiError) -> Response:
    """The response for ``error``, with ``Retry-After`` where waiting helps."""
    request_log.note_error(error)
    response = jsonify(payload(error, request.path))
    response.status_code = status(error, request.path)
    if error.retry_after is not None:
        # OpenAI's clients ignore 0 and give up on more than two minutes.
        response.headers["Retry-After"] = str(min(max(int(error.retry_after), 1), 120))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="transformers-api"'
    return response


def known(error: BaseException) -> ApiError:
    """``error`` itself if a client may see it; else it is logged and becomes EngineFailed."""
    if isinstance(error, ApiError):
        return error
    log.error("Unexpected error", exc_info=error, extra={"private": True})
    return EngineFailed("The server failed to handle the request; its log says more")


def _from_http(error: HTTPException) -> Response | HTTPException:
    """Werkzeug's own errors, such as an unknown URL, in our shape; redirects pass."""
    if error.code is None or error.code < 400:
        return error
    shown = _as_api_error(error)
    response = render(shown)
    if error.code != 400:
        response.status_code = error.code
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def _as_api_error(error: HTTPException) -> ApiError:
    if error.code == 404:
        return NotFound(f"Unknown URL: {request.method} {request.path}")
    if error.code == 405:
        return MethodNotAllowed(f"{request.method} is not allowed for {request.path}")
    if error.code == 413:
        return PayloadTooLarge(f"The body has more than {request.max_content_length} bytes")
    text = error.description or error.name
    return InvalidRequest(text) if (error.code or 500) < 500 else EngineFailed(text)


def install(app: Flask) -> None:
    """Render every error of ``app``."""
    app.register_error_handler(ApiError, render)
    app.register_error_handler(HTTPException, _from_http)
    app.register_error_handler(Exception, lambda error: render(known(error)))
