"""Ray itself, the little that is used of it: joined, left, its errors, its machines."""

from __future__ import annotations

import sys
from typing import Any

from transformers_api.cluster.signals import own_handlers
from transformers_api.config.environment import set_for_ray
from transformers_api.config.settings import SettingError, Settings

NAMESPACE = "transformers-api"
OWN_CODE = "transformers_modules"  # where transformers puts it
TOKEN = "token"  # the file in CLUSTER_FOLDER
BROADCAST_S = 3.0
# Straight from process to process: a message as an object of Ray takes twice as long.
STREAM = {"stream": True, "_by_reference": False}
LARGEST_MESSAGE = str(2**31 - 1)  # bytes, gRPC's own limit; traces may be large, Serve's is 4 MiB
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
        RAY_worker_niceness="0",  # Ray's own is 15: replicas would come after all others
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        # A replica that loads a model is slow to say how busy it is: 0.1 s sent requests elsewhere.
        RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S="1",
        RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=LARGEST_MESSAGE,
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
    with own_handlers():
        ray.init(
            address=settings.cluster_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
        )


def broadcast(handle: Any, method: str, arguments: tuple[Any, ...]) -> list[Any]:
    """The answers of all replicas; None of each that gives none now, nothing of dead ones.

    None of a replica that cannot be reached for a moment, too. Raises what Ray does.
    """
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import DeploymentUnavailableError

    response = handle.broadcast(method, *arguments)
    try:
        answers = response.results(timeout_s=BROADCAST_S, return_exceptions=True)
    except DeploymentUnavailableError:
        return []
    living = [answer for answer in answers if not isinstance(answer, ActorDiedError)]
    return [None if isinstance(answer, BaseException) else answer for answer in living]


def let_own_code_travel() -> None:
    """Send the classes of models' own code as they are: no front has the files they are from.

    Such a tokenizer comes with its code, which the operator has trusted (``trust_remote_code``).
    """
    from ray import cloudpickle

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == OWN_CODE:
            cloudpickle.register_pickle_by_value(module)


def kinds_of_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """(all replicas are full, the replica of this request has ended)."""
    from grpc.aio import AioRpcError
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
        AioRpcError,
    )
    return (BackPressureError,), lost


def disconnect() -> None:
    """Leave the cluster."""
    import ray

    ray.shutdown()


def nodes() -> list[dict[str, Any]]:
    """The machines of the cluster that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
