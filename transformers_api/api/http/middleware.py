"""The hooks around every request: its id, its time, its limits on the body, CORS."""

from __future__ import annotations

from collections.abc import Collection

from flask import Flask, Response
from flask_cors import CORS

from transformers_api.api.http import rate_limit_headers, request_log
from transformers_api.api.http.body import MAX_BODY_BYTES
from transformers_api.config.settings import Settings

EXPOSED = ["Retry-After", "X-Request-Id", "OpenAI-Processing-Ms", *rate_limit_headers.HEADERS]


def install(app: Flask, settings: Settings) -> None:
    """Add the hooks to ``app``."""
    app.config["MAX_CONTENT_LENGTH"] = max(MAX_BODY_BYTES, 2 * settings.prompt_bytes)
    app.before_request(request_log.begin)
    app.after_request(request_log.finish)
    if settings.cors_allow_origins:  # with no origins flask-cors would allow them all
        CORS(
            app,
            origins=list(settings.cors_allow_origins),  # settings.py lets no pattern through
            expose_headers=EXPOSED,
            supports_credentials=False,
            always_send=False,
            max_age=600,
        )
        app.after_request(_vary)


def _vary(response: Response) -> Response:
    """A cache may not give one page what it kept for another, nor for none."""
    response.vary.add("Origin")
    return response


def cors_headers(origins: Collection[str], origin: str) -> dict[str, str]:
    """The headers that flask-cors gives an answer to a page of ``origin``, for other answers."""
    if not origins:
        return {}
    if origin.lower() not in {allowed.lower() for allowed in origins}:
        return {"Vary": "Origin"}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": ", ".join(sorted(EXPOSED)),
        "Vary": "Origin",
    }
