"""The request router of a front, as Ray Serve asks for one: by residency.

An alpha interface of Ray: its version is pinned, and ``make test-scale`` holds it. Serve sends
the class itself to fronts, a copy for each: what is this process's own lies in ``routing``.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import (
    FIFOMixin,
    MultiplexMixin,
    RequestRouter,
)

from transformers_api.cluster import routing

CANDIDATES = 2  # of a group: the rest has more work
PLACED_S = 5.0  # a model that was asked for there is as good as in memory, until others are told


class ResidencyRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # untyped
    """Orders replicas with ``routing.ranks``, by the work that they had when they last answered."""

    silent: frozenset[str] = (
        frozenset()
    )  # replicas that do not answer, asked where there are no others

    def initialize_state(self, **options: Any) -> None:
        """Take ``request_router_kwargs``: ``spread`` alone."""
        self._spread: int = options["spread"]
        self._placed: dict[Any, tuple[str, float]] = {}  # by replica: the model it was asked for

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: Any = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas; Serve asks the least loaded of one, then of the next."""
        model = ""
        if pending_request is not None:
            model = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True
        since = time.monotonic() - PLACED_S
        placed = {id_ for id_, (name, at) in self._placed.items() if name == model and at > since}

        def work(replica: RunningReplica) -> int:
            return self.replica_queue_len_cache.get(replica.replica_id) or 0

        self._learn(candidate_replicas)
        spoken = [each for each in candidate_replicas if not self._is_silent(each)]
        order = routing.ranks(
            spoken or candidate_replicas,
            self._spread,
            holds=lambda each: (
                not model or model in each.multiplexed_model_ids or each.replica_id in placed
            ),
            is_empty=lambda each: (
                not each.multiplexed_model_ids and each.replica_id not in self._placed
            ),
            work=work,
        )
        return [group[:CANDIDATES] for group in order]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note which model a replica was asked for; with no name all have it, or load it beside."""
        model = pending_request.metadata.multiplexed_model_id
        if model:
            self._placed[replica_id] = model, time.monotonic()
        if len(self._placed) > 2 * len(self.curr_replicas):
            self._placed = {i: at for i, at in self._placed.items() if i in self.curr_replicas}

    def _learn(self, replicas: list[RunningReplica]) -> None:
        """Take from the last look at all replicas what Serve has forgotten: it does after 10 s."""
        for each in replicas:
            requests = routing.requests.get(each.replica_id.unique_id)
            if requests is not None and self.replica_queue_len_cache.get(each.replica_id) is None:
                self.on_new_queue_len_info(each.replica_id, requests)

    def _is_silent(self, replica: RunningReplica) -> bool:
        return replica.replica_id.unique_id in routing.silent
