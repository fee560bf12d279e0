"""``create_app``: the one place where the parts are wired together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask

from transformers_api import api
from transformers_api.api.http.rate_limits import RateLimits
from transformers_api.api.http.services import Services
from transformers_api.config.settings import SettingError, Settings
from transformers_api.engine.native.installation import compilations
from transformers_api.engines import ENGINES
from transformers_api.errors import ModelNotFound
from transformers_api.local_engine import Parts
from transformers_api.logs import configure_logging
from transformers_api.serving.inspect.recent_completions import Completions
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.limits.in_flight import InFlight
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.response_store import ResponseStore
from transformers_api.serving.swap.loaded_model import Loader

if TYPE_CHECKING:
    from transformers_api.metrics import Metrics


def create_app(settings: Settings | None = None, loader: Loader | None = None) -> Flask:
    """The WSGI application. ``loader`` stands in for the real one in tests without torch."""
    settings = settings or Settings.from_env()
    configure_logging(settings.log_level, settings.log_format, shows_texts=settings.log_prompts)
    access = Access.from_settings(settings)
    store = ModelStore(settings)
    registry = ModelRegistry.from_settings(settings, store.has_repo)
    metrics = _metrics(settings, registry)
    parts = Parts(
        settings=settings,
        registry=registry,
        store=store,
        admission=Admission(settings.max_inflight, settings.max_queue, settings.request_timeout_s),
        metrics=metrics,
        preloaded=_preloaded(settings, registry),
        loader=loader,
    )
    engine = ENGINES[settings.engine](parts)
    services = Services(
        settings=settings,
        registry=registry,
        store=store,
        swapper=engine.models,
        admission=parts.admission,
        in_flight=InFlight(
            settings.cluster_max_inflight,
            settings.client_max_inflight,
            settings.redis_url,
            parts.admission.retry_after,
        ),
        embeddings=engine.embeddings,
        responses=_responses(settings),
        completions=_completions(settings),
        inspections=engine.inspections,
        access=access,
        limits=RateLimits(access, settings.redis_url),
        metrics=metrics,
        ready=engine.ready,
        text_of=engine.text_of,
        devices=engine.devices,
        drain=engine.drain,
        fault=engine.fault,
    )
    parts.admission.on_end(services.jobs.end_all)
    app = Flask(__name__, static_folder=None)
    api.register(app, services)
    if metrics is not None:
        _watch(metrics, services)
    engine.begin()
    return app


def _responses(settings: Settings) -> ResponseStore:
    limits = settings.responses_store_mb << 20, settings.responses_store_ttl_s
    if settings.engine == "local" or settings.redis_url is None:
        return ResponseStore(*limits)
    from transformers_api.serving.shared_responses import SharedResponses

    return SharedResponses(settings.redis_url, *limits)


def _completions(settings: Settings) -> Completions:
    if settings.engine == "local" or settings.redis_url is None:
        return Completions()
    from transformers_api.serving.inspect.shared_completions import SharedCompletions

    return SharedCompletions(settings.redis_url)


def _watch(metrics: Metrics, services: Services) -> None:
    settings = services.settings
    metrics.watch(
        services.swapper.status,
        services.ready,
        services.admission.__len__,
        compilations(settings.native_cache, settings.torch_threads, settings.native_isa),
        services.responses.usage,
    )


def _metrics(settings: Settings, registry: ModelRegistry) -> Metrics | None:
    if not settings.metrics_allowed:
        return None
    from transformers_api.metrics import Metrics

    return Metrics([spec.name for spec in registry.list()])


def _preloaded(settings: Settings, registry: ModelRegistry) -> str | None:
    """The model that is loaded at start; none where an upstream answers for it."""
    if not settings.preload_model:
        return None
    try:
        spec = registry.resolve(settings.default_model)
    except ModelNotFound:
        raise SettingError(
            f"DEFAULT_MODEL='{settings.default_model}' is not in the registry; name another model "
            "or set PRELOAD_MODEL=false"
        ) from None
    return spec.name if spec.upstream is None else None
