"""What the views work with; ``app.py`` makes it, ``services()`` finds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import flask

from transformers_api.api.http.disconnect import DisconnectWatcher
from transformers_api.api.http.rate_limits import RateLimits
from transformers_api.api.http.stream_writer import Courier
from transformers_api.config.settings import Settings
from transformers_api.errors import ApiError
from transformers_api.serving.embeddings import EmbeddingModels
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.inspect.recent_completions import Completions
from transformers_api.serving.inspect.trace_plan import TraceSlots
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.swapper import Swapper

if TYPE_CHECKING:
    from transformers_api.api.http.request_log import RequestRecord

EXTENSION = "transformers_api"


def _always_ready() -> tuple[bool, str]:
    return True, "ready"


def _only_cpu() -> Collection[str]:
    return ("cpu",)


def _unlimited() -> RateLimits:
    return RateLimits(Access())


def _some_places() -> Admission:
    return Admission(32, 128)


def _never_faulty() -> None:
    return None


def _some_inspections() -> Inspections:
    return Inspections(4, 30.0)


def _nothing_to_drain(_grace_s: float) -> None:
    return None


class MetricsPage(Protocol):
    """What counts requests and shows all that is counted. From any thread."""

    def on_request(self, record: RequestRecord) -> None:
        """A request has ended. Never raises."""
        ...

    def on_refusal(self, error: ApiError) -> None:
        """A request was refused before it reached the application. Never raises."""
        ...

    def page(self) -> tuple[bytes, str]:
        """The metrics in Prometheus' text format, and its content type."""
        ...


@dataclass(frozen=True, kw_only=True)
class Services:
    """One per application, in ``app.extensions["transformers_api"]``."""

    settings: Settings
    registry: ModelRegistry
    store: ModelStore
    swapper: Swapper
    admission: Admission = field(default_factory=_some_places)
    embeddings: EmbeddingModels | None = None  # None: ENABLE_EMBEDDINGS_BACKEND is off
    access: Access = field(default_factory=Access)  # keys, and how much a client may ask
    limits: RateLimits = field(default_factory=_unlimited)  # the buckets of these
    completions: Completions = field(default_factory=Completions)  # tokens of recent answers
    inspections: Inspections = field(default_factory=_some_inspections)
    traces: TraceSlots = field(default_factory=TraceSlots)  # requests that are being traced
    metrics: MetricsPage | None = None  # None: METRICS_ENABLED is off
    started_at: float = field(default_factory=time.monotonic)  # seconds, time.monotonic()
    created: int = field(default_factory=lambda: int(time.time()))  # the same, since 1970
    watcher: DisconnectWatcher = field(default_factory=DisconnectWatcher)
    courier: Courier = field(default_factory=Courier)
    ready: Callable[[], tuple[bool, str]] = _always_ready  # whether to send requests, and why not
    fault: Callable[[], str | None] = _never_faulty  # why the process must be restarted
    devices: Callable[[], Collection[str]] = (
        _only_cpu  # of this machine: "cpu", "cuda", "cuda:0", …
    )
    drain: Callable[[float], None] = _nothing_to_drain  # let answers finish for so many seconds


def services() -> Services:
    """The services of the application that handles this request."""
    return cast(Services, flask.current_app.extensions[EXTENSION])
