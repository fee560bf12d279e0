"""The hooks around every request: its id, its time, its limits on the body, CORS."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from flask import Flask, Response, current_app, request
from flask_cors import CORS

from transformers_api.api.http import hosts, rate_limit_headers, request_log
from transformers_api.api.http.body import MAX_BODY_BYTES
from transformers_api.config.settings import Settings

UPLOADS = ("/inspect/lenses/", "/inspect/saes/")  # below which files of numbers are put
EXPOSED = ["Retry-After", "X-Request-Id", "OpenAI-Processing-Ms", *rate_limit_headers.HEADERS]
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]  # of WSGI

_SLASHES = re.compile("/{2,}")


def install(app: Flask, settings: Settings) -> None:
    """Add the hooks to ``app``."""
    app.config["MAX_CONTENT_LENGTH"] = max(MAX_BODY_BYTES, 2 * settings.prompt_bytes)
    most = (settings.inspect_file_mb << 20) + MAX_BODY_BYTES  # with a configuration beside it
    app.config["UPLOADS"] = dict.fromkeys(UPLOADS, most)
    app.before_request(_allow_upload)
    app.url_map.merge_slashes = False  # by a redirect, which few clients of APIs follow
    app.wsgi_app = PlainPaths(app.wsgi_app)  # type: ignore[method-assign]
    app.before_request(request_log.begin)
    hosts.install(app, settings)
    app.after_request(request_log.finish)
    app.teardown_request(_untie)
    if settings.cors_allow_origins:  # with no origins flask-cors would allow them all
        CORS(
            app,
            origins=list(settings.cors_allow_origins),  # settings.py lets no pattern through
            expose_headers=EXPOSED,
            supports_credentials=False,
            always_send=False,
            allow_private_network=True,  # of pages of these origins that come from the web
            max_age=600,
        )
        app.after_request(_vary)


def _allow_upload() -> None:
    """Let what is put below some paths be longer than any other body."""
    uploads: Mapping[str, int] = current_app.config["UPLOADS"]
    for start, most in uploads.items():
        if request.method == "PUT" and request.path.startswith(start):
            request.max_content_length = most


class PlainPaths:
    """Paths as they were meant: base URLs often end in a slash, or have ``/v1`` once too often."""

    def __init__(self, application: Application) -> None:
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """See WSGI."""
        path = environ.get("PATH_INFO", "")
        if "//" in path or path.startswith("/v1/v1"):
            path = _SLASHES.sub("/", path)
            while path.startswith("/v1/v1/"):
                path = path.removeprefix("/v1")
            environ["PATH_INFO"] = path
        return self._application(environ, start_response)


def _untie(_error: BaseException | None) -> None:
    """Part the request and its environ, which know each other, with the body in both."""
    request.environ.pop("werkzeug.request", None)


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
