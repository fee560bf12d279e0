"""GET /status and GET /metrics: what the server is doing. Neither waits for a model."""

from __future__ import annotations

import time
from typing import Any

from flask import Response

from transformers_api import __version__
from transformers_api.api.http.body import MAX_BODY_BYTES
from transformers_api.api.http.dialects import PlainBlueprint
from transformers_api.api.http.services import Services, services
from transformers_api.api.ops.schemas.status import Status
from transformers_api.api.seeds.schemas.generate import Detail
from transformers_api.config.settings import Settings
from transformers_api.errors import NotFound
from transformers_api.serving.swap.residency import SwapperStatus

blueprint = PlainBlueprint("monitoring", __name__, description="What the server is doing")


@blueprint.at("/metrics")
@blueprint.gives({"type": "string"}, content_type="text/plain", description="Metrics")
@blueprint.gives(Detail, 404, description="`METRICS_ENABLED` is off")
def metrics() -> Response:
    """Show the metrics in Prometheus' text format."""
    page = services().metrics
    if page is None:
        raise NotFound("This server shows no metrics: METRICS_ENABLED is off")
    text, content_type = page.page()
    return Response(text, content_type=content_type)


@blueprint.at("/status")
@blueprint.gives(Status)
def status() -> Any:
    """Say what is resident, what is coming and who waits, with the limits."""
    known = services()
    ready, reason = known.ready()
    seen = known.swapper.status()
    uptime_s = time.monotonic() - known.started_at
    return {
        "version": __version__,
        "uptime_s": round(uptime_s, 1),
        "started": known.created,
        "ready": ready,
        "reason": reason,
        "state": seen.state,
        "resident": None if seen.model is None else _resident(seen),
        "encoder": known.embeddings.encoder if known.embeddings else None,
        "loading": None if seen.loading is None else _loading(seen),
        "queued": dict(seen.waiting),
        "failed": dict(seen.last_errors),
        "requests": len(known.admission),
        "limits": _limits(known),
    }


def _resident(seen: SwapperStatus) -> dict[str, Any]:
    engine = seen.engine
    usage = engine.kv_used_bytes / engine.kv_budget_bytes if engine.kv_budget_bytes else 0.0
    return {
        "model": seen.model,
        "draining": seen.state == "draining",
        "since": round(time.time() - (time.monotonic() - seen.since)),
        "load_s": round(seen.load_s, 3),
        "bytes": seen.bytes,
        "dtype": seen.dtype,
        "quantization": seen.quantization,
        "kernels": seen.kernels,
        "device": seen.device,
        "max_model_len": seen.max_model_len,
        "mode": engine.mode,
        "leases": seen.leases,
        "running": engine.running,
        "waiting": engine.waiting,
        "kv_cache": {
            "bytes": engine.kv_bytes,
            "used_bytes": engine.kv_used_bytes,
            "budget_bytes": engine.kv_budget_bytes,
            "usage": round(min(usage, 1.0), 4),
        },
    }


def _loading(seen: SwapperStatus) -> dict[str, Any]:
    return {
        "model": seen.loading,
        "progress": round(seen.progress, 3),
        "doing": seen.progress_text,
    }


def _limits(known: Services) -> dict[str, Any]:
    settings: Settings = known.settings
    return {
        "max_inflight": settings.max_inflight,
        "max_queue": settings.max_queue,
        "threads": settings.threads,
        "max_prompt_bytes": settings.prompt_bytes,
        "max_body_bytes": max(MAX_BODY_BYTES, 2 * settings.prompt_bytes),
        "request_timeout_s": settings.request_timeout_s,
        "rate_limit_per_min": settings.rate_limit_per_min,
        "rate_limit_burst": settings.rate_limit_burst,
        "rate_limit_tokens_per_min": settings.rate_limit_tokens_per_min,
    }
