"""The hooks around every request: its id, its time, its limits on the body, CORS."""

from __future__ import annotations

from flask import Flask, Response, request
from flask_cors import CORS

from transformers_api.api.http import rate_limit_headers, request_log
from transformers_api.api.http.body import MAX_BODY_BYTES
from transformers_api.config.settings import Settings


def install(app: Flask, settings: Settings) -> None:
    """Add the hooks to ``app``."""
    app.config["MAX_CONTENT_LENGTH"] = max(MAX_BODY_BYTES, 2 * settings.prompt_bytes)
    app.before_request(request_log.begin)
    app.after_request(request_log.finish)
    app.teardown_request(_untie)
    if settings.cors_allow_origins:  # with no origins flask-cors would allow them all
        CORS(
            app,
            origins=list(settings.cors_allow_origins),  # settings.py lets no pattern through
            expose_headers=[
                "Retry-After",
                "X-Request-Id",
                "OpenAI-Processing-Ms",
                *rate_limit_headers.HEADERS,
            ],
            supports_credentials=False,
            always_send=False,
            max_age=600,
        )
        app.after_request(_vary)


def _untie(_error: BaseException | None) -> None:
    """Part the request and its environ, which know each other, with the body in both."""
    request.environ.pop("werkzeug.request", None)


def _vary(response: Response) -> Response:
    """A cache may not give one page what it kept for another, nor for none."""
    response.vary.add("Origin")
    return response
