"""Who asks, and whether they may: before every request, whatever it is for.

With API keys everything needs one unless it stands here as open, unknown URLs included. Without
keys everything is open.
"""

from __future__ import annotations

from flask import Flask, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from transformers_api.api.http.errors import INSPECTION_ROUTES, is_below
from transformers_api.api.http.services import Services, services
from transformers_api.api.ops.docs import ASSETS
from transformers_api.errors import InsufficientPermissions, InvalidApiKey
from transformers_api.serving.limits.access import network
from transformers_api.serving.limits.api_keys import ApiKey, ApiKeys

# For probes, and for browsers, which open a page without a key. They say nothing that is secret.
OPEN = frozenset(
    {
        "/health",
        "/healthz",
        "/readyz",
        "/docs",
        "/redoc",
        "/openapi.json",
        f"{ASSETS}/<path:filename>",
    }
)
# (method, rule); "*" is any method.
ADMIN = frozenset(
    {
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/<path:model_id>"),
        ("POST", "/models/<path:model_name>/load"),
        ("POST", "/models/<path:model_name>/unload"),
        ("DELETE", "/models/<path:model_name>/unload"),
        ("POST", "/load_model"),
        ("*", "/metrics"),
        ("*", "/status"),
    }
)
_READING = ("GET", "HEAD")


def admit() -> None:
    """Note who asks in ``g.client``, and let them pass or not.

    Raises InvalidApiKey, InsufficientPermissions, RateLimited.
    """
    access = services().access
    g.client = network(request.remote_addr or "")
    if request.method == "OPTIONS":  # what a browser asks before it sends a key
        return
    rule = request.url_rule.rule if request.url_rule else None
    if access.keys is not None and rule not in OPEN:
        key = _key(access.keys)
        if not key.may(_needed(rule)):
            raise InsufficientPermissions(
                f"{request.method} {request.path} needs an API key of the scope {_needed(rule)}"
            )
        g.client = f"key:{key.name}"
    # Where one looks inside the limit has its documented place among the other checks.
    if request.method not in _READING and not is_below(request.path, INSPECTION_ROUTES):
        services().limits.take_request()


def _needed(rule: str | None) -> str:
    is_admin = (request.method, rule) in ADMIN or ("*", rule) in ADMIN
    return "admin" if is_admin else "infer"


def _key(keys: ApiKeys) -> ApiKey:
    given = _given()
    if not given:
        raise InvalidApiKey(
            "You did not provide an API key: send it as Authorization: Bearer KEY, or as x-api-key"
        )
    key = keys.find(given)
    if key is None:
        raise InvalidApiKey("Incorrect API key provided")  # and never told which
    return key


def _given() -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")


def install(app: Flask, services: Services) -> None:
    """Ask before every request of ``app``, and show what is left of its limits."""
    proxies = services.settings.trusted_proxies
    if proxies:  # of what the header says, as many entries from its end
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=proxies, x_proto=0, x_host=0
        )
    app.before_request(admit)
    services.limits.init_app(app)
