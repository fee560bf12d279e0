"""Errors on the wire: the one place that renders them."""

from __future__ import annotations

import logging

import flask
from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from transformers_api.api.http import dialects, encodings, request_log
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import Dialect
from transformers_api.api.http.services import services
from transformers_api.errors import (
    ApiError,
    EngineFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    UnsupportedEncoding,
)

log = logging.getLogger(__name__)


def current_dialect() -> Dialect:
    """The dialect of this request's blueprint; of a URL that is no route, by its prefix."""
    blueprint = flask.current_app.blueprints.get(request.blueprint or "")
    return blueprint.dialect if isinstance(blueprint, Blueprint) else dialects.by_path(request.path)


def render(error: ApiError) -> Response:
    """The response for ``error``, with ``Retry-After`` where waiting helps."""
    request_log.note_error(error)
    dialect = current_dialect()
    response = jsonify(dialect.error_body(services().private_paths.public(error)))
    response.status_code = dialect.status(error)
    if error.retry_after is not None:
        # OpenAI's clients ignore 0 and give up on more than two minutes.
        response.headers["Retry-After"] = str(min(max(int(error.retry_after), 1), 120))
    if isinstance(error, UnsupportedEncoding):
        response.headers["Accept-Encoding"] = encodings.READABLE
    if error.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="transformers-api"'
    forget_frames(error)
    # A stream that this error comes instead of: nobody will close its response.
    abandoned = flask.g.pop("streaming", None)
    if abandoned is not None:
        abandoned.close()
    return response


def forget_frames(error: BaseException | None) -> None:
    """Let go of the frames that ``error``, and what it came from, went through.

    Each of these knows the frame that raised it, whose locals know the error again: such a circle,
    with the whole body in it, would live until the collector's oldest generation runs.
    """
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def visible(error: BaseException) -> ApiError:
    """``error`` itself if a client may see it; else it is logged and becomes EngineFailed."""
    if isinstance(error, ApiError):
        return error
    log.error("Unexpected error", exc_info=error, extra={"private": True})
    return EngineFailed("The server failed to handle the request; its log says more")


def _from_http(error: HTTPException) -> Response | HTTPException:
    """Werkzeug's own errors, such as an unknown URL, in our shape; redirects pass."""
    if error.code is None or error.code < 400:
        return error
    response = render(_as_api_error(error))
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
    app.register_error_handler(Exception, lambda error: render(visible(error)))
