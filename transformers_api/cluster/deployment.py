"""The replica as a deployment of Ray Serve. Imported on replicas, and where they are deployed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ray import serve

from transformers_api.cluster import ray_runtime
from transformers_api.cluster.messages import Failure, Outputs, Waiting
from transformers_api.cluster.replica import Replica
from transformers_api.config.settings import Settings


@serve.deployment
class ReplicaDeployment:
    """Passes on to a ``Replica``; Serve routes by the model that ``resident`` publishes.

    ``model``: the one that it has alone, and always; None: it takes turns with all.
    """

    async def __init__(self, settings: Settings, model: str | None = None) -> None:  # type: ignore[misc]  # Serve's way
        name = serve.get_replica_context().replica_id.unique_id
        threads = settings.torch_threads or max(int(settings.cluster_replica_cpus), 1)
        own = replace(settings, torch_threads=threads, engine="local", preload_model=False)
        if model is not None:
            own = replace(own, idle_unload_s=None)
        self._replica = Replica(own, name, publish=None if model else self.resident)
        if model is not None:
            await self._replica.keep(model)

    @serve.multiplexed(max_num_models_per_replica=1)
    async def resident(self, model: str) -> str:
        """Make it known to routers that this replica has ``model``."""
        return model

    async def describe(self, *arguments: Any) -> Any:
        """See Replica."""
        facts = await self._replica.describe(*arguments)
        ray_runtime.let_own_code_travel()
        return facts

    async def text(self, *arguments: Any) -> Any:
        """See Replica."""
        facts = await self._replica.text(*arguments)
        ray_runtime.let_own_code_travel()
        return facts

    async def generate(self, *arguments: Any) -> AsyncIterator[Outputs | Failure | Waiting]:
        """See Replica."""
        async for message in self._replica.generate(*arguments):
            yield message

    async def abort(self, *arguments: Any) -> Any:
        """See Replica."""
        return await self._replica.abort(*arguments)

    async def ask(self, *arguments: Any) -> Any:
        """See Replica."""
        return await self._replica.ask(*arguments)

    async def embed(self, *arguments: Any) -> Any:
        """See Replica."""
        return await self._replica.embed(*arguments)

    async def score(self, *arguments: Any) -> Any:
        """See Replica."""
        return await self._replica.score(*arguments)

    async def load(self, *arguments: Any) -> Any:
        """See Replica."""
        return await self._replica.load(*arguments)

    async def evict(self, *arguments: Any) -> Any:
        """See Replica."""
        return await self._replica.evict(*arguments)

    async def status(self) -> Any:
        """See Replica."""
        return await self._replica.status()

    async def metrics(self) -> Any:
        """See Replica."""
        return await self._replica.metrics()

    def check_health(self) -> None:
        """See Replica."""
        self._replica.check_health()
