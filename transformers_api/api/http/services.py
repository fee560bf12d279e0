"""The parts that views work with; ``app.py`` makes them, ``services()`` finds them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

import flask

from transformers_api.api.http.disconnect import DisconnectWatcher
from transformers_api.api.http.private_paths import PrivatePaths
from transformers_api.api.http.rate_limits import RateLimits
from transformers_api.api.http.stream_writer import StreamWriter
from transformers_api.config.settings import Settings
from transformers_api.errors import ApiError
from transformers_api.serving.embeddings import EmbeddingModels
from transformers_api.serving.inspect.calibration import CalibrationStore
from transformers_api.serving.inspect.jobs import Jobs
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.inspect.recent_completions import Completions
from transformers_api.serving.inspect.run_store import RunStore
from transformers_api.serving.inspect.tensor_store import TensorStore
from transformers_api.serving.inspect.trace_slots import TraceSlots
from transformers_api.serving.inspect.vector_store import VectorStore
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.limits.in_flight import InFlight
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.response_store import ResponseStore
from transformers_api.serving.swap.model_pool import ModelPool
from transformers_api.serving.text.model_text import ModelText
from transformers_api.serving.upstream.engine import UpstreamModels

if TYPE_CHECKING:
    from transformers_api.api.http.request_record import RequestRecord

EXTENSION = "transformers_api"


class MetricsPage(Protocol):
    """Counts requests, and shows all that is counted. From any thread."""

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
    swapper: ModelPool
    admission: Admission
    in_flight: InFlight  # over all servers that share a redis
    inspections: Inspections
    access: Access  # keys, and how much a client may ask
    limits: RateLimits  # the buckets of these
    ready: Callable[[], tuple[bool, str]]  # (may requests be sent, the reason)
    fault: Callable[[], str | None]  # why the process must be restarted
    text_of: Callable[[ModelSpec], ModelText]  # a model's tokenizer, without its weights
    devices: Callable[[], Collection[str]]  # of this machine: "cpu", "cuda", "cuda:0", …
    drain: Callable[[float], None]  # let answers finish for so many seconds
    responses: ResponseStore  # of /v1/responses
    embeddings: EmbeddingModels | None = None  # None: ENABLE_EMBEDDINGS_BACKEND is off
    metrics: MetricsPage | None = None  # None: METRICS_ENABLED is off
    completions: Completions = field(default_factory=Completions)  # tokens of recent answers
    upstreams: UpstreamModels = field(default_factory=UpstreamModels)  # models of other servers
    traces: TraceSlots = field(default_factory=TraceSlots)  # requests that are being traced
    vectors: VectorStore = field(default_factory=VectorStore)  # directions by name
    calibration: CalibrationStore = field(default_factory=CalibrationStore)  # usual texts
    jobs: Jobs = field(default_factory=Jobs)  # inspections that go on by themselves
    watcher: DisconnectWatcher = field(default_factory=DisconnectWatcher)
    stream_writer: StreamWriter = field(default_factory=StreamWriter)
    started_at: float = field(default_factory=time.monotonic)  # seconds, time.monotonic()
    created: int = field(default_factory=lambda: int(time.time()))  # the same, since 1970

    @cached_property
    def runs(self) -> RunStore:
        """Answers that are kept with what was noted of them."""
        settings = self.settings
        return RunStore(settings.model_store / "runs", settings.runs_max_mb << 20)

    @cached_property
    def lenses(self) -> TensorStore:
        """The lenses of all keys."""
        return self._tensors("lens")

    @cached_property
    def saes(self) -> TensorStore:
        """The sparse autoencoders of all keys."""
        return self._tensors("sae")

    def _tensors(self, kind: str) -> TensorStore:
        root = self.settings.model_store / "inspect"
        return TensorStore(root, kind, self.settings.inspect_file_mb << 20)

    @cached_property
    def private_paths(self) -> PrivatePaths:
        """The folders that clients are not told of."""
        return PrivatePaths(self.settings, self.registry.list())


def services() -> Services:
    """The services of the application that handles this request."""
    return cast(Services, flask.current_app.extensions[EXTENSION])
