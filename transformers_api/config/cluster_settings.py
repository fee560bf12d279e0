"""The settings of where models run: in this process, in a cluster, or behind upstreams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_api.config import parsers as to
from transformers_api.config.environment import cache_folder
from transformers_api.config.option import setting


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """The part of Settings that is about it; see docs/scale.md."""

    engine: str = setting(
        "local",
        to.choice("local", "ray", "openai"),
        "Where models run. local: in this process. ray: in the cluster that `cluster up` has "
        "started; this is one of its fronts. openai: nowhere here; only registry entries with "
        "`upstream` are served.",
    )
    cluster_address: str = setting(
        "127.0.0.1:6399", to.address, "Address of the cluster's head, for its fronts and machines."
    )
    cluster_folder: Path = setting(
        cache_folder("transformers-api", "cluster"),
        to.path,
        "Where the head keeps its token, its logs and its sockets; a path of at most 40 letters.",
    )
    cluster_replicas: int = setting(
        2, to.integer(1, 4096), "Replicas of the engine that `cluster up` starts, at least."
    )
    cluster_max_replicas: int | None = setting(
        None,
        to.integer(1, 4096),
        "Replicas that Ray may start while more than half of MAX_INFLIGHT are in flight on each "
        "of them. Default: CLUSTER_REPLICAS.",
    )
    cluster_max_inflight: int = setting(
        0,
        to.integer(0, 1_000_000),
        "Requests of all clients that may be in flight on all servers with the same REDIS_URL "
        "together; 0 for no limit but the replicas' own.",
    )
    cluster_replica_cpus: float = setting(
        1.0, to.number(0.01, 1024), "Cores of one replica, and its TORCH_THREADS, at least one."
    )
    cluster_replica_gpus: float = setting(
        0.0, to.number(0, 64), "GPUs of one replica; it sees no others."
    )
