"""The applications of Ray Serve: the replicas that share all models, and those of one model.

A registry entry with ``replicas`` has an application of its own, whose replicas have the model in
memory before they take requests; all other models share the replicas of one.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import transformers_api
from transformers_api.cluster import ray_runtime
from transformers_api.config.settings import Settings
from transformers_api.serving.models.spec import ReplicaRange

APP, DEPLOYMENT = "transformers-api", "Replica"
ROUTER = "transformers_api.cluster.router:ResidencyRouter"
# Chosen by benchmarks.autoscaling: docs/scale.md has the table.
UP_S, DOWN_S, LOOK_BACK_S, METRICS_S = 5.0, 600.0, 30.0, 2.0
_OTHERS = re.compile(r"[^A-Za-z0-9.-]+")


def app_of(model: str) -> str:
    """The application of a model with replicas of its own; files and processes are named so."""
    return f"{APP}.{_OTHERS.sub('_', model)[:40]}.{sha256(model.encode()).hexdigest()[:8]}"


def ranges(settings: Settings, replicas: int) -> ReplicaRange:
    """The replicas of the models that have none of their own."""
    return ReplicaRange(replicas, max(settings.cluster_max_replicas or replicas, replicas))


def deploy(settings: Settings, shared: ReplicaRange, own: Mapping[str, ReplicaRange]) -> None:
    """Start all replicas, or replace running ones by others, one after the other; wait for it.

    ``own``: the models that have replicas of their own.
    """
    from ray import serve
    from ray.serve import RunTarget

    targets = {APP: _application(settings, shared, None)}
    targets |= {app_of(model): _application(settings, span, model) for model, span in own.items()}
    serve.start(proxy_location="Disabled")
    serve.run_many(
        [RunTarget(target=app, name=name, route_prefix=None) for name, app in targets.items()]
    )
    for name in set(applications()) - set(targets):
        serve.delete(name)


def scale(settings: Settings, span: ReplicaRange) -> dict[str, Any]:
    """Serve's options for so many replicas: fixed, or by how many requests are in flight."""
    if span.most == span.least:
        return {"num_replicas": span.least}
    return {
        "num_replicas": None,
        "autoscaling_config": {
            "min_replicas": span.least,
            "max_replicas": span.most,
            "target_ongoing_requests": max(settings.max_inflight // 2, 1),
            "upscale_delay_s": UP_S,
            "downscale_delay_s": DOWN_S,
            "look_back_period_s": LOOK_BACK_S,
            "metrics_interval_s": METRICS_S,
        },
    }


def _application(settings: Settings, span: ReplicaRange, model: str | None) -> Any:
    from ray.serve.config import RequestRouterConfig

    from transformers_api.cluster.deployment import ReplicaDeployment

    root = Path(transformers_api.__file__).resolve().parents[1]
    router = RequestRouterConfig(
        request_router_class=ROUTER, request_router_kwargs={"spread": settings.max_inflight}
    )
    deployment = ReplicaDeployment.options(  # type: ignore[attr-defined]  # Serve's decorator
        name=DEPLOYMENT,
        max_ongoing_requests=settings.max_inflight + settings.max_queue,
        max_queued_requests=max(settings.max_queue, 1),
        graceful_shutdown_timeout_s=settings.graceful_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        request_router_config=router,
        ray_actor_options={
            "num_cpus": settings.cluster_replica_cpus,
            "num_gpus": settings.cluster_replica_gpus,
            "runtime_env": {
                "env_vars": {
                    "PYTHONPATH": str(root),
                    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": ray_runtime.LARGEST_MESSAGE,
                    # All that a replica does on its loop is short: no second loop for it.
                    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
                    # Another variable is another version to Serve: running replicas are replaced.
                    "DEPLOYED_AS": uuid.uuid4().hex,
                }
            },
        },
        **scale(settings, span),
    )
    return deployment.bind(settings, model)


def applications() -> list[str]:
    """Ours that are deployed."""
    from ray import serve

    return [name for name in serve.status().applications if name.partition(".")[0] == APP]


def handles(models: Iterable[str]) -> dict[str, Any]:
    """The handles of the replicas: under "" of those that share, and of each model's own."""
    from ray import serve

    deployed, names = set(applications()), {app_of(model): model for model in models} | {APP: ""}
    return {
        model: serve.get_deployment_handle(DEPLOYMENT, name)
        for name, model in names.items()
        if name in deployed
    }


def shutdown() -> None:
    """End the replicas, once their answers are complete."""
    from ray import serve

    for name in applications():
        serve.delete(name, _blocking=False)
    for name in applications():
        serve.delete(name)


def deployed() -> dict[str, Any]:
    """Serve's own word on the replicas: its status, and how many are in which state."""
    from ray import serve

    statuses, states = set[str](), dict[str, int]()
    for name, application in serve.status().applications.items():
        if name.partition(".")[0] != APP:
            continue
        statuses.add(application.status.value)
        for deployment in application.deployments.values():
            for state, count in deployment.replica_states.items():
                states[state] = states.get(state, 0) + count
    return {"status": " and ".join(sorted(statuses)) or "none", "replicas": states}
