"""Ray and Ray Serve, the little that is used of them. No other module imports Ray."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import transformers_api
from transformers_api.config.environment import set_for_ray
from transformers_api.config.settings import SettingError, Settings

APP, DEPLOYMENT, NAMESPACE = "transformers-api", "Replica", "transformers-api"
TOKEN = "token"  # the file in CLUSTER_FOLDER
BROADCAST_S = 3.0
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def prepare(settings: Settings) -> None:
    """Set what Ray reads of the environment, before it is imported.

    Every connection needs the token. With a loopback address all of Ray stays on the loopback.
    """
    host = settings.cluster_address.rpartition(":")[0]
    set_for_ray(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(settings.cluster_folder.absolute() / TOKEN),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0" if host in LOOPBACK else "1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
    try:
        import ray  # noqa: F401
    except ImportError:
        raise SettingError("ENGINE=ray needs Ray: pip install 'transformers-api[ray]'") from None


def connect(settings: Settings) -> None:
    """Join the cluster as a driver. Idempotent."""
    prepare(settings)
    import ray

    if ray.is_initialized():
        return
    ray.init(
        address=settings.cluster_address,
        namespace=NAMESPACE,
        log_to_driver=False,
        configure_logging=False,
    )


def handle() -> Any:
    """The handle of the replicas; a model's id may go with each request."""
    from ray import serve

    return serve.get_deployment_handle(DEPLOYMENT, APP)


def broadcast(handle: Any, method: str, arguments: tuple[Any, ...]) -> list[Any]:
    """The answers of all replicas that give one in time."""
    answers = handle.broadcast(method, *arguments).results(
        timeout_s=BROADCAST_S, return_exceptions=True
    )
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def kinds_of_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """(all replicas are full, the replica of this request has ended)."""
    from ray import exceptions
    from ray.serve.exceptions import (
        BackPressureError,
        DeploymentUnavailableError,
        ReplicaUnavailableError,
    )

    lost = (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.ObjectLostError,
        ReplicaUnavailableError,
        DeploymentUnavailableError,
    )
    return (BackPressureError,), lost


def deploy(settings: Settings, replicas: int) -> None:
    """Start the replicas, or replace running ones by others, one after the other; wait for it."""
    from ray import serve

    from transformers_api.cluster.deployment import ReplicaDeployment

    most = max(settings.cluster_max_replicas or replicas, replicas)
    scale: dict[str, Any] = {"num_replicas": replicas}
    if most > replicas:
        target = max(settings.max_inflight * 3 // 4, 1)
        scale = {
            "num_replicas": None,
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": most,
                "target_ongoing_requests": target,
            },
        }
    root = Path(transformers_api.__file__).resolve().parents[1]
    deployment = ReplicaDeployment.options(  # type: ignore[attr-defined]  # Serve's decorator
        name=DEPLOYMENT,
        max_ongoing_requests=settings.max_inflight + settings.max_queue,
        max_queued_requests=max(settings.max_queue, 1),
        graceful_shutdown_timeout_s=settings.graceful_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        ray_actor_options={
            "num_cpus": settings.cluster_replica_cpus,
            "num_gpus": settings.cluster_replica_gpus,
            # Another variable is another version to Serve: running replicas are replaced.
            "runtime_env": {"env_vars": {"PYTHONPATH": str(root), "DEPLOYED_AS": uuid.uuid4().hex}},
        },
        **scale,
    )
    serve.start(proxy_location="Disabled")
    serve.run(deployment.bind(settings), name=APP, route_prefix=None)


def shutdown() -> None:
    """End the replicas, once their answers are complete."""
    from ray import serve

    serve.delete(APP)


def deployed() -> dict[str, Any]:
    """Serve's own word on the replicas: its status, and how many are in which state."""
    from ray import serve

    application = serve.status().applications.get(APP)
    if application is None:
        return {"status": "none", "replicas": {}}
    deployment = application.deployments.get(DEPLOYMENT)
    states = {} if deployment is None else dict(deployment.replica_states)
    return {"status": application.status.value, "replicas": states}


def disconnect() -> None:
    """Leave the cluster."""
    import ray

    ray.shutdown()


def nodes() -> list[dict[str, Any]]:
    """The machines of the cluster that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
