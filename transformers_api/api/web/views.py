"""GET /ui and its files, and who gets the page at /: those who would rather have HTML than JSON."""

from __future__ import annotations

from flask import Blueprint, Response, abort, request

from transformers_api.api.http.auth import scope
from transformers_api.api.web.assets import PREFIX, Asset, assets

HTML, JSON = "text/html", "application/json"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_FOREVER = "public, max-age=31536000, immutable"

blueprint = Blueprint("page", __name__)


def prefers_page() -> bool:
    """True where ``Accept`` names ``text/html`` itself, with a weight above that of JSON."""
    accept = request.accept_mimetypes
    named = [weight for value, weight in accept if value.lower() == HTML]
    return bool(named) and max(named) > accept[JSON]


def page() -> Response:
    """Give the page."""
    return _sent(assets().page, "no-cache")


@blueprint.get(PREFIX)
@scope("open")
def ui() -> Response:
    """Give the page, whatever is accepted."""
    return page()


@blueprint.get(f"{PREFIX}/<version>/<path:name>")
@scope("open")
def file(version: str, name: str) -> Response:
    """Give a file of the page; its URL changes with its content."""
    asset = assets().files.get(name) if version == assets().version else None
    if asset is None:
        abort(404)
    return _sent(asset, _FOREVER)


def _sent(asset: Asset, caching: str) -> Response:
    gzipped = asset.gzipped
    is_gzipped = gzipped is not None and request.accept_encodings["gzip"] > 0
    body = gzipped if gzipped is not None and is_gzipped else asset.raw
    response = Response(body, content_type=asset.content_type, headers=_HEADERS)
    response.headers["Cache-Control"] = caching
    response.vary.add("Accept-Encoding")
    if is_gzipped:
        response.headers["Content-Encoding"] = "gzip"
    response.set_etag(f"{asset.etag}-gzip" if is_gzipped else asset.etag)
    response.make_conditional(request)
    return response
