"""GET /health, /healthz, /readyz, /version and /: the server lives, serves, and what it is."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from flask import Response, jsonify

from transformers_api import __version__
from transformers_api.api.http.auth import scope
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import PLAIN
from transformers_api.api.http.services import services
from transformers_api.api.ops.schemas.health import Health, Probe, Ready, Start, Version
from transformers_api.api.web import views as web
from transformers_api.memory import process_bytes

blueprint = Blueprint(
    "health", __name__, dialect=PLAIN, description="Whether the server lives and can serve"
)


@blueprint.at("/health")
@scope("open")
@blueprint.gives(Health)
def health() -> Any:
    """Say how the server is.

    `status` is `degraded` while no model is in memory. Never waits for a model.
    """
    status = services().swapper.status()
    adapters = [adapter.name for adapter in status.engine.adapters]
    loaded = [] if status.model is None else [status.model, *adapters]
    return {
        "status": "healthy" if loaded else "degraded",
        "ok": True,
        "model_ready": status.state == "ready",
        "model_loaded": bool(loaded),
        "current_model": status.model,
        "models_loaded": loaded,
        "loaded_models": len(loaded),
        "active_requests": status.leases,
        "total_models": len(services().registry.list()),
        "cuda_available": "cuda" in services().devices(),
        "device": status.device,
        "cache_dir": None,  # the server's folders are nobody's business
        "memory": {"process_bytes": process_bytes(), "model_bytes": status.bytes},
        "system": {
            "platform": platform.system(),
            "python": platform.python_version(),
            "cpu_count": os.cpu_count(),
        },
        "uptime": _uptime(time.monotonic() - services().started_at),
    }


def _uptime(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m {rest}s"


@blueprint.at("/healthz")
@scope("open")
@blueprint.gives(Probe)
def healthz() -> Any:
    """Say that the process answers."""
    return {"status": "ok"}


@blueprint.at("/readyz")
@scope("open")
@blueprint.gives(Ready)
@blueprint.gives(Ready, 503, description="Send no requests now; `reason` says why.")
def readyz() -> Response:
    """Say whether requests may be sent."""
    ready, reason = services().ready()
    reason = services().private_paths.hide(reason)
    answer = jsonify({"status": "ready" if ready else "not ready", "reason": reason})
    answer.status_code = 200 if ready else 503
    return answer


@blueprint.at("/version")
@blueprint.gives(Version)
def version() -> Any:
    """Give the version of this server."""
    return {"version": __version__}


@blueprint.at("/")
@scope("open")
@blueprint.gives(Start)
def index() -> Any:
    """Say what this is, and where to go on; browsers get the page."""
    answer = web.page() if web.prefers_page() else jsonify(_start())
    answer.vary.add("Accept")
    return answer


def _start() -> dict[str, Any]:
    return {
        "name": "Transformers API",
        "message": "Transformers API: Hugging Face language models over the OpenAI API",
        "status": "ok",
        "version": __version__,
        "documentation": "/docs",
        "health": "/health",
        "endpoints": {
            "page": "/ui",
            "docs": "/docs",
            "redoc": "/redoc",
            "openapi": "/openapi.json",
            "models": "/v1/models",
            "chat": "/v1/chat/completions",
            "completions": "/v1/completions",
            "generate": "/generate",
        },
    }
