"""GET /status and GET /metrics: what the server is doing. Neither waits for a model."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from flask import Response

from transformers_api import __version__
from transformers_api.api.http.auth import scope
from transformers_api.api.http.body import MAX_BODY_BYTES, Blueprint
from transformers_api.api.http.dialects import PLAIN
from transformers_api.api.http.error_schemas import Detail
from transformers_api.api.http.services import services
from transformers_api.api.ops.schemas.status import Status
from transformers_api.config.settings import Settings
from transformers_api.errors import NotFound
from transformers_api.memory import free_bytes, process_bytes, total_bytes
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.swap.replica_status import ReplicaStatus
from transformers_api.serving.swap.residency import SwapperStatus

blueprint = Blueprint("monitoring", __name__, dialect=PLAIN, description="What the server is doing")


@blueprint.at("/metrics")
@scope("admin")
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
@scope("admin")
@blueprint.gives(Status)
def status() -> Any:
    """Say what is resident, what is coming and who waits, with the limits."""
    ready, reason = services().ready()
    swapper = services().swapper.status()
    models = services().embeddings
    hide = services().private_paths.hide
    uptime_s = time.monotonic() - services().started_at
    return {
        "version": __version__,
        "uptime_s": round(uptime_s, 1),
        "started": services().created,
        "ready": ready,
        "reason": hide(reason),
        "state": swapper.state,
        "resident": None if swapper.model is None else _resident(swapper),
        "encoder": models.encoder if models else None,
        "loading": None if swapper.loading is None else _loading(swapper),
        "swaps": [{**asdict(event), "error": _hidden(event.error)} for event in swapper.swaps],
        "queued": dict(swapper.waiting),
        "failed": {name: hide(text) for name, text in swapper.last_errors.items()},
        "requests": len(services().admission),
        "memory": {
            "process_bytes": process_bytes(),
            "machine_bytes": total_bytes(),
            "free_bytes": free_bytes(),
        },
        "limits": _limits(services().settings, services().admission),
        "engine": services().settings.engine,
        "replicas": [_replica(each) for each in swapper.replicas],
    }


def _resident(swapper: SwapperStatus) -> dict[str, Any]:
    engine = swapper.engine
    usage = engine.kv_used_bytes / engine.kv_budget_bytes if engine.kv_budget_bytes else 0.0
    return {
        "model": swapper.model,
        "draining": swapper.state == "draining",
        "since": round(time.time() - (time.monotonic() - swapper.since)),
        "load_s": round(swapper.load_s, 3),
        "bytes": swapper.bytes,
        "dtype": swapper.dtype,
        "quantization": swapper.quantization,
        "weights": dict(swapper.weights),
        "kernels": swapper.kernels,
        "isa": swapper.isa,
        "device": swapper.device,
        "max_model_len": swapper.max_model_len,
        "mode": engine.mode,
        "adapters": [
            {"model": each.name, "bytes": each.bytes, "leases": each.users}
            for each in engine.adapters
        ],
        "leases": swapper.leases,
        "running": engine.running,
        "waiting": engine.waiting,
        "prompt_tokens": engine.prompt_tokens,
        "generated_tokens": engine.generated_tokens,
        "kv_cache": {
            "bytes": engine.kv_bytes,
            "used_bytes": engine.kv_used_bytes,
            "budget_bytes": engine.kv_budget_bytes,
            "token_bytes": engine.kv_token_bytes,
            "usage": round(min(usage, 1.0), 4),
        },
    }


def _replica(each: ReplicaStatus) -> dict[str, Any]:
    swapper = each.swapper
    return {
        "replica": each.replica,
        "machine": each.node,
        "pid": each.pid,
        "ready": each.ready,
        "reason": services().private_paths.hide(each.reason),
        "state": swapper.state,
        "model": swapper.model,
        "adapters": [adapter.name for adapter in swapper.engine.adapters],
        "loading": swapper.loading,
        "requests": each.requests,
        "leases": swapper.leases,
        "running": swapper.engine.running,
        "waiting": swapper.engine.waiting,
        "queued": dict(swapper.waiting),
        "swaps": len(swapper.swaps),
        "generated_tokens": swapper.engine.generated_tokens,
        "process_bytes": each.process_bytes,
    }


def _loading(swapper: SwapperStatus) -> dict[str, Any]:
    return {
        "model": swapper.loading,
        "progress": round(swapper.progress, 3),
        "doing": swapper.progress_text,
        "stage": swapper.stage,
        "since": round(swapper.loading_since, 3),
        "last_load_s": swapper.last_load_s,
    }


def _hidden(text: str | None) -> str | None:
    return None if text is None else services().private_paths.hide(text)


def _limits(settings: Settings, admission: Admission) -> dict[str, Any]:
    return {
        "max_inflight": admission.slots,
        "max_queue": admission.waiting,
        "threads": settings.threads,
        "max_prompt_bytes": settings.prompt_bytes,
        "max_body_bytes": max(MAX_BODY_BYTES, 2 * settings.prompt_bytes),
        "request_timeout_s": settings.request_timeout_s,
        "rate_limit_per_min": settings.rate_limit_per_min,
        "inspections_per_min": services().limits.inspections_per_min,
        "rate_limit_burst": settings.rate_limit_burst,
        "rate_limit_tokens_per_min": settings.rate_limit_tokens_per_min,
    }
