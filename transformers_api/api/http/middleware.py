"""What happens around every request: its id, its time, its limits on the body, CORS."""

from __future__ import annotations

import re
import time
import uuid

from flask import Flask, Response, g, request
from flask_cors import CORS

from transformers_api import logs
from transformers_api.api.http import rate_limit_headers, request_log
from transformers_api.api.http.body import MAX_BODY_BYTES
from transformers_api.config.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _begin() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    logs.request_id.set(g.request_id)  # each request runs on one thread
    request_log.begin()


def _end(response: Response) -> Response:
    # A malformed request may fail before _begin.
    response.headers["X-Request-Id"] = g.get("request_id") or uuid.uuid4().hex
    spent_s = time.monotonic() - request_log.current().began
    response.headers["OpenAI-Processing-Ms"] = str(round(1000 * spent_s))
    return request_log.watch(response)


def install(app: Flask, settings: Settings) -> None:
    """Add the hooks to ``app``."""
    app.config["MAX_CONTENT_LENGTH"] = max(MAX_BODY_BYTES, 2 * settings.prompt_bytes)
    app.before_request(_begin)
    app.after_request(_end)
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


def _vary(response: Response) -> Response:
    """A cache may not give one page what it kept for another, nor for none."""
    response.vary.add("Origin")
    return response
