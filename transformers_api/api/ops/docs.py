"""The OpenAPI document and the two pages that show it, without any other host."""

from __future__ import annotations

from flask import Blueprint, Flask, Response, request
from flask_smorest import Api  # type: ignore[import-untyped]

from transformers_api import __version__
from transformers_api.api.openai.schemas.answers import Error

ASSETS = "/docs/assets"
KEY_SCHEME = "ApiKey"
_PAGES = ("/docs", "/redoc")
# Redoc's footer shows a logo from its makers' host.
_POLICY = "img-src 'self' data:; font-src 'self' data:; connect-src 'self'"


class OpenAPI(Api):  # type: ignore[misc]
    """flask-smorest's document with our error object; ``errors.py`` renders the errors."""

    ERROR_SCHEMA = Error

    def _register_error_handlers(self) -> None:
        pass


def install(app: Flask, *, needs_key: bool) -> OpenAPI:
    """Add ``/openapi.json``, ``/docs`` and ``/redoc``; blueprints register with the result.

    Where ``needs_key`` is false, a key may be given and changes nothing.
    """
    app.config.update(
        API_TITLE="Transformers API",
        API_VERSION=__version__,
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/",
        OPENAPI_JSON_PATH="openapi.json",
        OPENAPI_SWAGGER_UI_PATH="docs",
        OPENAPI_SWAGGER_UI_URL=f"{ASSETS}/swagger-ui/",
        OPENAPI_REDOC_PATH="redoc",
        OPENAPI_REDOC_URL=f"{ASSETS}/redoc/redoc.standalone.js",
    )
    app.register_blueprint(
        Blueprint("assets", __name__, static_folder="static", static_url_path=ASSETS)
    )
    app.after_request(_stay_at_home)
    bearer: list[dict[str, list[str]]] = [{KEY_SCHEME: []}]
    api = OpenAPI(app, spec_kwargs={"security": bearer if needs_key else [{}, *bearer]})
    scheme = {"type": "http", "scheme": "bearer", "description": "An API key of this server"}
    api.spec.components.security_scheme(KEY_SCHEME, scheme)
    return api


def _stay_at_home(response: Response) -> Response:
    if request.path in _PAGES:
        response.headers["Content-Security-Policy"] = _POLICY
    return response
