"""The OpenAPI document and the two pages that show it, without any other host."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from apispec import APISpec
from flask import Blueprint, Flask, Response, request
from flask_smorest import Api  # type: ignore[import-untyped]

from transformers_api import __version__
from transformers_api.api.http.auth import scope
from transformers_api.api.http.error_schemas import Error

ASSETS = "/docs/assets"
KEY_SCHEME = "ApiKey"
_PAGES = ("/docs", "/redoc")
_ABOUT = (
    "Text from causal language models: OpenAI's API, a native one, and what happens inside a model "
    "while it writes."
)
# Redoc's footer shows a logo from its makers' host.
_POLICY = "img-src 'self' data:; font-src 'self' data:; connect-src 'self'"


class OpenAPI(Api):  # type: ignore[misc]
    """flask-smorest's document with our error object; ``errors.py`` renders the errors.

    Routes are served at once and described when somebody first asks for the document: describing
    them takes four fifths of the making of an application.
    """

    ERROR_SCHEMA = Error

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._undescribed: list[Any] = []  # flask-smorest's blueprints, which have no types
        self._describing = threading.RLock()
        super().__init__(*args, **kwargs)

    def register_blueprint(self, blueprint: Any) -> None:
        """Add the routes of ``blueprint`` now, and their description later."""
        self._app.extensions["flask-smorest"]["blp_name_to_api"][blueprint.name] = self
        self._app.register_blueprint(blueprint)
        self._undescribed.append(blueprint)

    @property
    def spec(self) -> APISpec:
        """The document, complete."""
        with self._describing:
            while self._undescribed:
                blueprint = self._undescribed.pop(0)
                blueprint.register_views_in_doc(
                    self, self._app, self._spec, name=blueprint.name, parameters=None
                )
                self._spec.tag({"name": blueprint.name, "description": blueprint.description})
                _tell_apart(self._spec._paths)
            return self._spec

    @spec.setter
    def spec(self, spec: APISpec) -> None:
        self._spec = spec

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
    api = OpenAPI(
        app,
        spec_kwargs={
            "security": bearer if needs_key else [{}, *bearer],
            "servers": [{"url": "/", "description": "This server"}],
            "info": {"description": _ABOUT},
        },
    )
    scheme = {"type": "http", "scheme": "bearer", "description": "An API key of this server"}
    api.spec.components.security_scheme(KEY_SCHEME, scheme)
    for endpoint, view in app.view_functions.items():
        if endpoint.startswith(("assets.", "api-docs.")):
            app.view_functions[endpoint] = scope("open")(partial(view))
    return api


def _tell_apart(paths: dict[str, Any]) -> None:
    """Give operations names of their own, where views share one or serve several methods."""
    names: set[str] = set()
    for path in paths.values():
        for method, operation in path.items():
            if method == "parameters":
                continue
            name = operation["operationId"]
            if name in names:
                tag = operation["tags"][0]
                options = (f"{tag}_{name}", f"{tag}_{name}_{method}")
                name = next(option for option in options if option not in names)
            operation["operationId"] = name
            names.add(name)


def _stay_at_home(response: Response) -> Response:
    if request.path in _PAGES:
        response.headers["Content-Security-Policy"] = _POLICY
    return response
