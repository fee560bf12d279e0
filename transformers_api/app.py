"""``create_app``: the one place where the parts are wired together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flask import Flask

from transformers_api import api
from transformers_api.api.services import Services
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ModelNotFound
from transformers_api.loading import EncoderLoader, ModelLoader
from transformers_api.logs import configure_logging
from transformers_api.readiness import Readiness
from transformers_api.serving.embeddings import EmbeddingModels, EncoderRegistry
from transformers_api.serving.models import Loader
from transformers_api.serving.registry import ModelRegistry
from transformers_api.serving.store import ModelStore
from transformers_api.serving.swapper import Swapper
from transformers_api.settings import SettingError, Settings


def create_app(settings: Settings | None = None, loader: Loader | None = None) -> Flask:
    """The WSGI application. ``loader`` stands in for the real one in tests without torch."""
    settings = settings or Settings.from_env()
    configure_logging(settings.log_level)
    store = ModelStore(settings)
    registry = ModelRegistry.from_settings(settings, store.has_repo)
    thread = None
    encoder_loader = loader
    if loader is None:
        thread = EngineThread(settings.torch_threads)
        loader = ModelLoader(settings, store, thread)
        encoder_loader = EncoderLoader(settings, store, thread)
    readiness = Readiness(_preloaded(settings, registry), thread)
    swapper = Swapper(
        registry,
        loader,
        swap_after_s=settings.swap_after_s,
        drain_s=settings.drain_s,
        wait_s=settings.model_wait_s,
        idle_unload_s=settings.idle_unload_s,
        overlap=settings.swap_overlap,
        auto_load=settings.auto_load,
        listener=readiness,
    )
    swappers, embeddings = [swapper], None
    if settings.enable_embeddings_backend:
        assert encoder_loader is not None
        encoders = _encoders(settings, registry, encoder_loader)
        embeddings = EmbeddingModels(registry, swapper, encoders, max(settings.max_queue, 1))
        swappers.append(encoders)
        if isinstance(loader, ModelLoader):
            loader.make_room = embeddings.give_back
    app = Flask(__name__, static_folder=None)
    services = Services(
        settings=settings,
        registry=registry,
        store=store,
        swapper=swapper,
        embeddings=embeddings,
        ready=readiness,
        devices=loader.devices,
        drain=partial(_drain, readiness, swappers),
    )
    api.register(app, services)
    if thread is not None:
        thread.call(_import_engine)  # while the server already answers its health checks
    if settings.preload_model:
        swapper.load(settings.default_model, wait=False)
    return app


def _encoders(settings: Settings, registry: ModelRegistry, loader: Loader) -> Swapper:
    """What lives beside the resident model, one at a time; AUTO_LOAD says nothing about it."""
    return Swapper(
        EncoderRegistry(registry),
        loader,
        swap_after_s=settings.swap_after_s,
        drain_s=settings.drain_s,
        wait_s=settings.model_wait_s,
        idle_unload_s=settings.idle_unload_s,
    )


def _drain(readiness: Readiness, swappers: Sequence[Swapper], grace_s: float) -> None:
    for swapper in swappers:
        readiness.drain(swapper, grace_s)


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


def _import_engine() -> None:
    import transformers_api.engine.loader  # noqa: F401
