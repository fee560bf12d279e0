"""How errors look on the wire: the one place that renders them."""

from __future__ import annotations

import logging
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

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


def payload(error: ApiError, path: str) -> dict[str, Any]:
    """The body in the dialect of the route: OpenAI's error object, or ``{"detail": text}``."""
    if not any(path == start or path.startswith(f"{start}/") for start in OPENAI_ROUTES):
        return {"detail": error.message}
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def render(error: ApiError) -> Response:
    """The response for ``error``, with ``Retry-After`` where waiting helps."""
    response = jsonify(payload(error, request.path))
    response.status_code = error.status
    if error.retry_after is not None:
        # OpenAI's clients ignore 0 and give up on more than two minutes.
        response.headers["Retry-After"] = str(min(max(int(error.retry_after), 1), 120))
    return response


def known(error: BaseException) -> ApiError:
    """``error`` itself if a client may see it; else it is logged and becomes EngineFailed."""
    if isinstance(error, ApiError):
        return error
    log.error("Unexpected error", exc_info=error)
    return EngineFailed("The server failed to handle the request; its log says more")


def _from_http(error: HTTPException) -> Response | HTTPException:
    """Werkzeug's own errors, such as an unknown URL, in our shape; redirects pass."""
    if error.code is None or error.code < 400:
        return error
    shown = _as_api_error(error)
    response = render(shown)
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
