"""The engines that may be behind the same API: ``ENGINE`` chooses one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from transformers_api.errors import ModelNotCapable, ServerShuttingDown
from transformers_api.local_engine import EngineSide, Parts, local_engine
from transformers_api.server.readiness import LAST_WORDS_S
from transformers_api.serving.embeddings import EmbeddingModels
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.model_pool import NoModels
from transformers_api.serving.text.model_text import ModelText

CPU = ("cpu",)


def ray_engine(parts: Parts) -> EngineSide:
    """``ENGINE=ray``: replicas of the local engine in a cluster, over Ray Serve."""
    from transformers_api.cluster.front import cluster_engine

    return cluster_engine(parts)


def upstream_engine(parts: Parts) -> EngineSide:
    """``ENGINE=openai``: no model here at all; upstreams answer for every registry entry."""
    settings, models = parts.settings, NoModels()
    embeddings = None
    if settings.enable_embeddings_backend:
        embeddings = EmbeddingModels(parts.registry, models, models, max(settings.max_queue, 1))
    leaving: list[str] = []

    def drain(grace_s: float) -> None:
        leaving.append("The server is shutting down")
        error = ServerShuttingDown(leaving[0], retry_after=5)
        parts.admission.end_after(grace_s - LAST_WORDS_S, error)

    return EngineSide(
        models=models,
        embeddings=embeddings,
        inspections=Inspections(settings.inspect_queue, settings.inspect_timeout_s),
        text_of=_no_text,
        devices=lambda: CPU,
        ready=lambda: (not leaving, leaving[0] if leaving else "ready"),
        fault=lambda: None,
        drain=drain,
        begin=lambda: None,
    )


def _no_text(spec: ModelSpec) -> ModelText:
    raise ModelNotCapable(f"Model '{spec.name}' is not loaded by this server", param="model")


ENGINES: Mapping[str, Callable[[Parts], EngineSide]] = MappingProxyType(
    {"local": local_engine, "ray": ray_engine, "openai": upstream_engine}
)
