"""``ENGINE=local``: the model in this process, on its engine thread; replicas are made so, too."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from transformers_api.config.settings import Settings
from transformers_api.encoder_loader import EncoderLoader
from transformers_api.engine.platform.dataclass_code import stored_methods
from transformers_api.engine.platform.imports import without_collection
from transformers_api.engine.platform.lazy_torch import import_torch
from transformers_api.engine.thread import EngineThread
from transformers_api.logs import adopt
from transformers_api.model_loader import ModelLoader
from transformers_api.server.readiness import Readiness
from transformers_api.serving.embeddings import EmbeddingModels, EncoderRegistry
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.adapters import AdapterSwapper
from transformers_api.serving.swap.loaded_model import Loader
from transformers_api.serving.swap.model_pool import ModelPool
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.residency import Listeners, SwapperListener
from transformers_api.serving.swap.swapper import Swapper
from transformers_api.serving.text.model_text import ModelText

if TYPE_CHECKING:
    from transformers_api.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of an application that every engine is made of."""

    settings: Settings
    registry: ModelRegistry
    store: ModelStore
    admission: Admission
    metrics: Metrics | None
    preloaded: str | None  # the model that is loaded at start
    loader: Loader | None = None  # stands in for the real one


@dataclass(frozen=True, kw_only=True)
class EngineSide:
    """All of an application that is about its models, wherever they are."""

    models: ModelPool
    embeddings: EmbeddingModels | None
    inspections: Inspections
    text_of: Callable[[ModelSpec], ModelText]
    devices: Callable[[], Collection[str]]
    ready: Callable[[], tuple[bool, str]]
    fault: Callable[[], str | None]
    drain: Callable[[float], None]
    begin: Callable[[], object]  # what takes seconds, while health checks are answered already


def local_engine(parts: Parts) -> EngineSide:
    """The engine in this process."""
    settings, registry, metrics = parts.settings, parts.registry, parts.metrics
    thread, loader, encoder_loader = None, parts.loader, parts.loader
    embeddings: EmbeddingModels | None = None
    if loader is None:
        thread = EngineThread(settings.torch_threads, lazy_torch=settings.lazy_torch)
        loader = ModelLoader(  # which calls back when it loads: swappers are there by then
            *(settings, parts.store, thread),
            make_room=lambda lacking: embeddings is not None and embeddings.give_back(lacking),
            listen=metrics.engine if metrics else lambda _model: None,
            wake=lambda: swapper.wake(),
            constraint_listener=metrics.constraints if metrics else None,
        )
        encoder_loader = EncoderLoader(settings, parts.store, thread)
    loads = [each.deadline for each in (loader, encoder_loader) if isinstance(each, ModelLoader)]
    readiness = Readiness(parts.preloaded, thread, settings.step_timeout_s, loads)
    swapper = AdapterSwapper(
        registry,
        loader,
        _swap_rules(settings, overlap=settings.swap_overlap),
        wait_s=settings.model_wait_s,
        auto_load=settings.auto_load,
        listener=_listeners(metrics, readiness),
    )
    swappers: list[Swapper] = [swapper]
    if settings.enable_embeddings_backend and encoder_loader is not None:
        encoders = _encoders(settings, registry, encoder_loader, _listeners(metrics))
        embeddings = EmbeddingModels(registry, swapper, encoders, max(settings.max_queue, 1))
        swappers.append(encoders)
    return EngineSide(
        models=swapper,
        embeddings=embeddings,
        inspections=Inspections(settings.inspect_queue, settings.inspect_timeout_s),
        text_of=loader.text,
        devices=loader.devices,
        ready=readiness,
        fault=readiness.fault,
        drain=partial(readiness.drain, swappers, parts.admission),
        begin=partial(_begin, settings, thread, swapper, parts.preloaded),
    )


def _begin(
    settings: Settings, thread: EngineThread | None, swapper: Swapper, preloaded: str | None
) -> None:
    if thread is not None:
        thread.call(partial(_import_engine, settings))
    if preloaded is not None:
        swapper.load(preloaded, wait=False)


def _listeners(metrics: Metrics | None, *others: SwapperListener) -> SwapperListener:
    if metrics is None:
        return Listeners(*others)
    from transformers_api.metrics import ModelEvents

    return Listeners(*others, ModelEvents(metrics))


def _encoders(
    settings: Settings, registry: ModelRegistry, loader: Loader, listener: SwapperListener
) -> Swapper:
    """The swapper of encoders: one beside the resident model, whatever AUTO_LOAD says."""
    return Swapper(
        EncoderRegistry(registry),
        loader,
        _swap_rules(settings),
        wait_s=settings.model_wait_s,
        listener=listener,
    )


def _swap_rules(settings: Settings, *, overlap: bool = False) -> SwapRules:
    return SwapRules(
        swap_after_s=settings.swap_after_s,
        drain_s=settings.drain_s,
        min_resident_s=settings.swap_min_resident_s,
        idle_unload_s=settings.idle_unload_s,
        overlap=overlap,
    )


def _import_engine(settings: Settings) -> None:
    """Import what never goes away again, so that nobody looks through it for garbage.

    That takes a sixth of the time of the imports, and later, at every swap or in the middle of an
    answer, as long as several tokens.
    """
    is_first = "transformers_api.engine.loader" not in sys.modules
    stored = settings.model_store.absolute() / "imports"
    with without_collection(), stored_methods(stored, "engine"):
        import_torch(lazy=settings.lazy_torch, transformers=True, exports=stored)
        import transformers_api.engine.loader  # noqa: F401

        if is_first:  # what a later one would keep may be garbage, of models even
            gc.freeze()
    adopt("transformers", "huggingface_hub")
