"""``create_app``: the one place where the parts are wired together."""

from __future__ import annotations

import gc
import sys
from functools import partial
from typing import TYPE_CHECKING

from flask import Flask

from transformers_api import api
from transformers_api.api.http.rate_limits import RateLimits
from transformers_api.api.http.services import Services
from transformers_api.config.settings import SettingError, Settings
from transformers_api.encoder_loader import EncoderLoader
from transformers_api.engine.native.installation import compilations
from transformers_api.engine.platform.imports import without_collection
from transformers_api.engine.platform.lazy_torch import import_torch
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ModelNotFound
from transformers_api.logs import adopt, configure_logging
from transformers_api.model_loader import ModelLoader
from transformers_api.server.readiness import Readiness
from transformers_api.serving.embeddings import EmbeddingModels, EncoderRegistry
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.response_store import ResponseStore
from transformers_api.serving.swap.adapters import AdapterSwapper
from transformers_api.serving.swap.loaded_model import Loader
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.residency import Listeners, SwapperListener
from transformers_api.serving.swap.swapper import Swapper

if TYPE_CHECKING:
    from transformers_api.metrics import Metrics


def create_app(settings: Settings | None = None, loader: Loader | None = None) -> Flask:
    """The WSGI application. ``loader`` stands in for the real one in tests without torch."""
    settings = settings or Settings.from_env()
    configure_logging(settings.log_level, settings.log_format, shows_texts=settings.log_prompts)
    access = Access.from_settings(settings)
    store = ModelStore(settings)
    registry = ModelRegistry.from_settings(settings, store.has_repo)
    thread, encoder_loader = None, loader
    embeddings: EmbeddingModels | None = None
    metrics = _metrics(settings, registry)
    if loader is None:
        thread = EngineThread(settings.torch_threads, lazy_torch=settings.lazy_torch)
        loader = ModelLoader(  # which calls back when it loads: swappers are there by then
            *(settings, store, thread),
            make_room=lambda lacking: embeddings is not None and embeddings.give_back(lacking),
            listen=metrics.engine if metrics else lambda _model: None,
            wake=lambda: swapper.wake(),
            constraint_listener=metrics.constraints if metrics else None,
        )
        encoder_loader = EncoderLoader(settings, store, thread)
    loads = [each.deadline for each in (loader, encoder_loader) if isinstance(each, ModelLoader)]
    readiness = Readiness(_preloaded(settings, registry), thread, settings.step_timeout_s, loads)
    admission = Admission(settings.max_inflight, settings.max_queue, settings.request_timeout_s)
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
    services = Services(
        settings=settings,
        registry=registry,
        store=store,
        swapper=swapper,
        admission=admission,
        embeddings=embeddings,
        responses=_responses(settings),
        inspections=Inspections(settings.inspect_queue, settings.inspect_timeout_s),
        access=access,
        limits=RateLimits(access, settings.redis_url),
        metrics=metrics,
        ready=readiness,
        text_of=loader.text,
        devices=loader.devices,
        drain=partial(readiness.drain, swappers, admission),
        fault=readiness.fault,
    )
    app = Flask(__name__, static_folder=None)
    api.register(app, services)
    if metrics is not None:
        _watch(metrics, services)
    _begin(settings, thread, swapper)
    return app


def _responses(settings: Settings) -> ResponseStore:
    return ResponseStore(settings.responses_store_mb << 20, settings.responses_store_ttl_s)


def _watch(metrics: Metrics, services: Services) -> None:
    settings = services.settings
    metrics.watch(
        services.swapper.status,
        services.ready,
        services.admission.__len__,
        compilations(settings.native_cache, settings.torch_threads, settings.native_isa),
        services.responses.usage,
    )


def _begin(settings: Settings, thread: EngineThread | None, swapper: Swapper) -> None:
    """Start what takes seconds, while the server already answers its health checks."""
    if thread is not None:
        thread.call(partial(_import_engine, settings.lazy_torch))
    if settings.preload_model:
        swapper.load(settings.default_model, wait=False)


def _metrics(settings: Settings, registry: ModelRegistry) -> Metrics | None:
    if not settings.metrics_allowed:
        return None
    from transformers_api.metrics import Metrics

    return Metrics([spec.name for spec in registry.list()])


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


def _preloaded(settings: Settings, registry: ModelRegistry) -> str | None:
    """The model that is loaded at start."""
    if not settings.preload_model:
        return None
    try:
        return registry.resolve(settings.default_model).name
    except ModelNotFound:
        raise SettingError(
            f"DEFAULT_MODEL='{settings.default_model}' is not in the registry; name another model "
            "or set PRELOAD_MODEL=false"
        ) from None


def _import_engine(lazy: bool) -> None:
    """Import what never goes away again, so that nobody looks through it for garbage.

    That takes a sixth of the time of the imports, and later, at every swap or in the middle of an
    answer, as long as several tokens.
    """
    is_first = "transformers_api.engine.loader" not in sys.modules
    with without_collection():
        import_torch(lazy=lazy, transformers=True)
        import transformers_api.engine.loader  # noqa: F401

        if is_first:  # what a later one would keep may be garbage, of models even
            gc.freeze()
    adopt("transformers", "huggingface_hub")
