"""The models of a server, wherever they run: here, in a cluster, or nowhere at all."""

from __future__ import annotations

import time
from typing import Protocol

from transformers_api.errors import ApiError, ModelNotCapable
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.residency import Lease, SwapperStatus


class ModelPool(Protocol):
    """Gives out leases on models. ``Swapper`` is the one that has a model in this process."""

    def lease(
        self,
        spec: ModelSpec,
        *,
        model_id: str | None = None,
        client: str = "",
        cancellation: Cancellation | None = None,
        timeout: float | None = None,
    ) -> Lease:
        """See Swapper."""
        ...

    def load(
        self,
        model_id: str,
        *,
        device: str | None = None,
        client: str = "",
        wait: bool = True,
        timeout: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """See Swapper."""
        ...

    def evict(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        wait: bool = True,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """See Swapper."""
        ...

    def status(self) -> SwapperStatus:
        """See Swapper."""
        ...

    def resident(self) -> LoadedModel | None:
        """See Swapper."""
        ...

    def refuse(self, error: ApiError | None = None) -> None:
        """See Swapper."""
        ...

    def close(self, error: ApiError | None = None) -> None:
        """See Swapper."""
        ...

    def wake(self) -> None:
        """See Swapper."""
        ...


class NoModels:
    """A ModelPool of a server that has none: upstreams answer for all of its models."""

    def lease(
        self,
        spec: ModelSpec,
        *,
        model_id: str | None = None,
        client: str = "",
        cancellation: Cancellation | None = None,
        timeout: float | None = None,
    ) -> Lease:
        """Raises ModelNotCapable."""
        raise _nowhere(model_id or spec.name)

    def load(
        self,
        model_id: str,
        *,
        device: str | None = None,
        client: str = "",
        wait: bool = True,
        timeout: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """Raises ModelNotCapable."""
        raise _nowhere(model_id)

    def evict(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        wait: bool = True,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """See ModelPool: there is nothing."""
        return False

    def status(self) -> SwapperStatus:
        """See ModelPool."""
        return SwapperStatus(state="empty", since=time.monotonic())

    def resident(self) -> LoadedModel | None:
        """See ModelPool."""
        return None

    def refuse(self, error: ApiError | None = None) -> None:
        """See ModelPool: upstreams hear nothing of it."""

    def close(self, error: ApiError | None = None) -> None:
        """See ModelPool."""

    def wake(self) -> None:
        """See ModelPool."""


def _nowhere(model_id: str) -> ModelNotCapable:
    return ModelNotCapable(f"Model '{model_id}' is not loaded by this server", param="model")
