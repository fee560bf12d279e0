"""Authentication: before every request, whatever it is for.

With API keys every route needs one of its scope, unknown URLs included; the views say which with
``scope``. Without keys everything is open.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, Protocol, TypeVar

import flask
from flask import Flask, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from transformers_api.api.http.dialects import is_below
from transformers_api.api.http.services import EXTENSION, Services
from transformers_api.errors import InsufficientPermissions, InvalidApiKey, Unavailable
from transformers_api.serving.limits.access import Access, network
from transformers_api.serving.limits.api_keys import ApiKey, ApiKeys

# open: for probes, and for browsers, which open a page without a key; nothing in it is secret.
Scope = Literal["open", "infer", "admin"]
View = TypeVar("View", bound=Callable[..., Any])

# There the limit has its documented place among the other checks: inspect_auth.py.
LIMITED_LATER = ("/chat/stream", "/inspect")
_READING = ("GET", "HEAD")

# Most requests come from few addresses, and parsing one takes as long as all the rest here.
_network = lru_cache(maxsize=1024)(network)


class Head(Protocol):
    """The head of a request that is not complete yet."""

    def field(self, name: bytes) -> str:
        """The value of a header, by its name in lower case; "" without it."""
        ...


def scope(name: Scope) -> Callable[[View], View]:
    """Declare what an API key needs to call a view; without a word it is ``infer``."""

    def declare(view: View) -> View:
        view.scope = name  # type: ignore[attr-defined]
        return view

    return declare


def scope_of(view: Callable[..., Any] | None) -> Scope:
    """The declared scope; None stands for a URL that is no route."""
    declared: Scope = getattr(view, "scope", "infer")
    return declared


def admit() -> None:
    """Note the client in ``g.client``, and let it pass or not.

    Raises InvalidApiKey, InsufficientPermissions, Unavailable, RateLimited.
    """
    app = flask.current_app
    services: Services = app.extensions[EXTENSION]
    access = services.access
    g.client = _network(request.remote_addr or "")
    if request.method == "OPTIONS":  # what a browser asks before it sends a key
        return
    if access.keys is not None:
        _check_key(access.keys, scope_of(app.view_functions.get(request.endpoint or "")))
    if not access.limits_all or request.method in _READING:
        return
    if not is_below(request.path, LIMITED_LATER):
        services.limits.take_request()


def _check_key(keys: ApiKeys, needed: Scope) -> None:
    if needed == "open":
        return
    key = _key(keys)
    if not key.may(needed):
        raise InsufficientPermissions(
            f"{request.method} {request.path} needs an API key of the scope {needed}"
        )
    g.client = f"key:{key.name}"


def _key(keys: ApiKeys) -> ApiKey:
    secret = _secret()
    if not secret:
        raise InvalidApiKey(
            "You did not provide an API key: send it as Authorization: Bearer KEY, or as x-api-key"
        )
    key = keys.find(secret)
    if key is None:
        raise InvalidApiKey("Incorrect API key provided")  # and never told which
    return key


def _secret() -> str:
    headers = request.headers
    return _secret_of(headers.get("Authorization", ""), headers.get("X-Api-Key", ""))


def _secret_of(authorization: str, api_key: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else api_key


def _may_upload(access: Access, head: Head) -> bool:
    """True where the body may be longer than any other: nobody without a key fills the memory."""
    if access.keys is None:
        return True
    secret = _secret_of(head.field(b"authorization"), head.field(b"x-api-key"))
    try:
        return bool(secret) and access.keys.find(secret) is not None
    except Unavailable:
        return False


def install(app: Flask, services: Services) -> None:
    """Ask before every request of ``app``, and show what is left of its limits."""
    proxies = services.settings.trusted_proxies
    if proxies:  # of what the header says, as many entries from its end
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=proxies, x_proto=0, x_host=0
        )
    app.before_request(admit)
    app.config["MAY_UPLOAD"] = partial(_may_upload, services.access)  # asked before there is a body
    services.limits.init_app(app)
