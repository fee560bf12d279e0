"""``transformers-api cluster up | status | down``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers_api.cluster import applications, ray_runtime
from transformers_api.cluster.head import Head
from transformers_api.config.settings import Settings
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import ReplicaRange
from transformers_api.serving.swap.replica_status import ReplicaStatus

Row = tuple[str, ...]


def up(settings: Settings, *, replicas: int | None, waits: bool, joins: bool = False) -> int:
    """Start the head where it does not run, and its replicas; replace those that run.

    ``waits``: until a signal ends it, and end it all then. ``joins``: the head is somebody else's,
    who starts and ends it.
    """
    settings = replace(settings, engine="ray")
    if joins:
        ray_runtime.connect(settings)
    else:
        Head(settings).start()
    shared = applications.ranges(settings, replicas or settings.cluster_replicas)
    applications.deploy(settings, shared, models_with_replicas(settings))
    write_status(settings)
    if not waits:
        return 0
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    return 0 if joins else down(settings)


def status(settings: Settings) -> int:
    """Show the replicas; 1 where there is no head."""
    if Head(settings).pid is None and not _is_elsewhere(settings):
        sys.stdout.write(f"No head runs at {settings.cluster_address}\n")
        return 1
    ray_runtime.connect(settings)
    write_status(settings)
    return 0


def down(settings: Settings) -> int:
    """End the replicas, once their answers are complete, and the head; 1 where there is none."""
    head = Head(settings)
    if head.pid is not None:
        try:
            ray_runtime.connect(settings)
            applications.shutdown()
            ray_runtime.disconnect()
        except Exception as error:  # it has to end all the same
            sys.stderr.write(f"The replicas could not be asked to end: {error}\n")
    if not head.stop():
        sys.stdout.write(f"No head runs at {settings.cluster_address}\n")
        return 1
    sys.stdout.write("The cluster has ended\n")
    return 0


def models_with_replicas(settings: Settings) -> dict[str, ReplicaRange]:
    """The entries of the registry that have replicas of their own."""
    registry = ModelRegistry.from_settings(settings)
    specs = (spec for spec in registry.list() if spec.base is None)
    return {spec.name: spec.replicas for spec in specs if spec.replicas is not None}


def write_status(settings: Settings) -> None:
    """Write what is there to standard output."""
    deployed = applications.deployed()
    states = ", ".join(f"{count} {state.lower()}" for state, count in deployed["replicas"].items())
    machines = len(ray_runtime.nodes())
    sys.stdout.write(
        f"{settings.cluster_address}: {deployed['status'].lower()}, replicas: {states or 'none'}, "
        f"machines: {machines}\n"
    )
    rows: list[Row] = [("REPLICA", "MACHINE", "PID", "STATE", "MODEL", "RUNNING", "WAITING")]
    rows += [_row(each) for each in _replicas(models_with_replicas(settings))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _row(each: ReplicaStatus) -> Row:
    swapper = each.swapper
    model = swapper.model or swapper.loading or "-"
    counts = (str(swapper.engine.running), str(swapper.engine.waiting))
    return (each.replica, each.node, str(each.pid), swapper.state, model, *counts)


def _replicas(models: Iterable[str]) -> list[Any]:
    try:
        handles = applications.handles(models).values()
        answers = [each for one in handles for each in ray_runtime.broadcast(one, "status", ())]
        return [answer for answer in answers if answer is not None]
    except Exception:  # none is deployed
        return []


def _is_elsewhere(settings: Settings) -> bool:
    host = settings.cluster_address.rpartition(":")[0]
    return host not in ray_runtime.LOOPBACK
