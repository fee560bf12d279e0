"""The counting of everything that ``/metrics`` shows; ``metric_names.py`` lists it.

Labels come from closed sets: registered models, rules of URLs, codes of errors. What a client sends
is never one.

The engine thread counts in plain numbers that only it writes (``tallies.py``); they become metrics
when somebody asks. Everything else is rare enough for prometheus_client's own counters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from transformers_api import __version__, errors
from transformers_api import metric_names as names
from transformers_api.errors import (
    ApiError,
    ConstraintFailed,
    ConstraintRefused,
    ConstraintsUnavailable,
)
from transformers_api.metric_names import Named
from transformers_api.serving.swap.residency import SwapperListener, SwapperStatus
from transformers_api.tallies import ConstraintTally, EngineTally, Tally

if TYPE_CHECKING:
    from transformers_api.api.http.request_record import RequestRecord

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads

OTHER = "other"  # stands for whatever is not in a closed set
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Metrics:
    """All metrics of one application; meets ``api.services.MetricsPage``. From any thread.

    ``models``: the names that may be labels.
    """

    def __init__(self, models: Collection[str]) -> None:
        self.extend: Callable[[bytes], bytes] = bytes  # the page by those of other processes
        self._models = frozenset(models)
        self._codes = frozenset(_codes())
        self._engines: dict[str, EngineTally] = {}
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        make = self._make_counter
        self._http, self._refused = make(names.HTTP), make(names.REFUSED)
        self._gone, self._traces, self._inspections = (
            make(names.GONE),
            make(names.TRACES),
            make(names.INSPECTIONS),
        )
        self.swaps, self.evicted, self.load_failed = (
            make(names.SWAPS),
            make(names.EVICTED),
            make(names.LOAD_FAILED),
        )
        self._calls, self._reasoning = make(names.CALLS), make(names.REASONING)
        self._constraint_failures = make(names.CONSTRAINT_FAILURES)
        self.constraints = ConstraintTally(self._make_histogram(names.COMPILE).observe)
        self.load = self._make_histogram(names.LOAD)
        self._wait = self._make_histogram(names.MODEL_WAIT)
        self._http_time = self._make_histogram(names.HTTP_TIME)
        for code in self._codes:  # so that the first one of a kind is seen to grow
            self._refused.labels(code)
        for reason in _CONSTRAINT_FAILURES.values():
            self._constraint_failures.labels(reason)

    def page(self) -> tuple[bytes, str]:
        """See api.services.MetricsPage."""
        return self.extend(generate_latest(self.registry)), CONTENT_TYPE_PLAIN_0_0_4

    def watch(
        self,
        status: Callable[[], SwapperStatus],
        ready: Callable[[], tuple[bool, str]],
        active: Callable[[], int],
        compilations: Mapping[str, int],
        stored: Callable[[], tuple[int, int]],
    ) -> None:
        """Show what these say when somebody asks, and what the engines count. Once.

        ``compilations``: runs of the kernels' compiler, by their result. ``stored``: answers that
        are kept, and their bytes.
        """
        self.registry.register(_Engines(self._engines))
        self.registry.register(_Answers(self.constraints.waits, stored))
        self.registry.register(_Residents(status, ready, active, self.model, compilations))

    def engine(self, model: str) -> EngineTally:
        """The listener to the steps of ``model``."""
        return self._engines.setdefault(self.model(model), EngineTally())

    def model(self, name: str) -> str:
        """The label of a model."""
        return name if name in self._models else OTHER

    def code(self, error: ApiError) -> str:
        """The label of an error."""
        code = error.code or _WRONG
        return code if code in self._codes else OTHER

    def on_request(self, record: RequestRecord) -> None:
        """See api.services.MetricsPage."""
        method = record.method if record.method in METHODS else OTHER
        self._http.labels(record.route, method, f"{record.status // 100}xx").inc()
        self._http_time.labels(record.route, method).observe(record.seconds)
        if record.model is not None and record.model_wait_s is not None:
            self._wait.labels(self.model(record.model)).observe(record.model_wait_s)
        self._count_parts(record)
        if record.client_gone:
            self._gone.inc()
        elif record.error is not None:
            self.on_refusal(record.error)
        elif record.route.startswith("/inspect/") and record.method == "POST":
            self._inspections.inc()
        if record.is_traced:
            self._traces.inc()

    def on_refusal(self, error: ApiError) -> None:
        """See api.services.MetricsPage."""
        self._refused.labels(self.code(error)).inc()
        reason = _CONSTRAINT_FAILURES.get(type(error))
        if reason is not None:
            self._constraint_failures.labels(reason).inc()

    def _count_parts(self, record: RequestRecord) -> None:
        parts, model = record.parts, self.model(record.model or "")
        if parts.calls:
            self._calls.labels(model, parts.choice, parts.format).inc(parts.calls)
        if parts.reasoning_tokens:
            self._reasoning.labels(model).inc(parts.reasoning_tokens)

    def _make_counter(self, named: Named) -> Counter:
        return Counter(named.name, named.help, named.labels, registry=self.registry)

    def _make_histogram(self, named: Named) -> Histogram:
        return Histogram(
            named.name, named.help, named.labels, registry=self.registry, buckets=named.buckets
        )


class ModelEvents(SwapperListener):
    """Counts what one swapper does."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last: str | None = None

    def on_load(self, model_id: str, seconds: float) -> None:
        """See SwapperListener."""
        self._metrics.load.labels(self._metrics.model(model_id)).observe(seconds)
        if self._last not in (None, model_id):
            self._metrics.swaps.inc()
        self._last = model_id

    def on_evict(self, model_id: str) -> None:
        """See SwapperListener."""
        self._metrics.evicted.labels(self._metrics.model(model_id)).inc()

    def on_load_failed(self, model_id: str, error: ApiError) -> None:
        """See SwapperListener."""
        metrics = self._metrics
        metrics.load_failed.labels(metrics.model(model_id), metrics.code(error)).inc()


class _Engines(Collector):
    """The numbers of the engine thread, which goes on writing them meanwhile."""

    def __init__(self, engines: dict[str, EngineTally]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        engines = dict(self._engines)
        fresh = EngineTally()
        for named in fresh.tallies:
            histogram = HistogramMetricFamily(named.name, named.help, labels=named.labels)
            for model, engine in engines.items():
                histogram.add_metric([model], *_cumulated(named, engine.tallies[named]))
            yield histogram
        for named in fresh.counts:
            counter = CounterMetricFamily(named.name, named.help, labels=named.labels)
            for model, engine in engines.items():
                counter.add_metric([model], engine.counts[named])
            yield counter
        ends = CounterMetricFamily(
            names.SUCCESS.name, names.SUCCESS.help, labels=names.SUCCESS.labels
        )
        for model, engine in engines.items():
            for reason, count in engine.ends.items():
                ends.add_metric([model, reason.value], count)
        yield ends


class _Answers(Collector):
    """The waits for masks, and the answers that are kept."""

    def __init__(self, waits: Tally, stored: Callable[[], tuple[int, int]]) -> None:
        self._waits = waits
        self._stored = stored

    def collect(self) -> Iterator[Metric]:
        waited = HistogramMetricFamily(names.MASK_WAIT.name, names.MASK_WAIT.help)
        waited.add_metric([], *_cumulated(names.MASK_WAIT, self._waits))
        yield waited
        count, size = self._stored()
        yield _gauge(names.STORED, [((), count)])
        yield _gauge(names.STORED_BYTES, [((), size)])


class _Residents(Collector):
    """The models that are resident, coming and waited for."""

    def __init__(
        self,
        status: Callable[[], SwapperStatus],
        ready: Callable[[], tuple[bool, str]],
        active: Callable[[], int],
        label: Callable[[str], str],
        compilations: Mapping[str, int],
    ) -> None:
        self._status = status
        self._ready = ready
        self._active = active
        self._label = label
        self._compilations = compilations

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield _gauge(names.BUILD, [((__version__,), 1)])
        yield _gauge(names.READY, [((), self._ready()[0])])
        yield _gauge(names.ACTIVE, [((), self._active())])
        yield _gauge(names.THREADS, [((), threading.active_count())])
        compiled = CounterMetricFamily(
            names.COMPILED.name, names.COMPILED.help, labels=names.COMPILED.labels
        )
        for result, count in self._compilations.items():
            compiled.add_metric([result], count)
        yield compiled
        yield from self._of_resident(status)
        waiting: dict[str, int] = {}
        for name, count in status.waiting.items():
            waiting[self._label(name)] = waiting.get(self._label(name), 0) + count
        yield _gauge(names.CALLERS, [((name,), count) for name, count in waiting.items()])
        coming = [] if status.loading is None else [self._label(status.loading)]
        yield _gauge(names.PROGRESS, [((name,), status.progress) for name in coming])

    def _of_resident(self, status: SwapperStatus) -> Iterator[Metric]:
        engine = status.engine
        usage = min(engine.kv_used_bytes / max(engine.kv_budget_bytes, 1), 1.0)
        values: dict[Named, float] = {
            names.RUNNING: engine.running,
            names.WAITING: engine.waiting,
            names.KV: usage,
            names.WEIGHTS: status.bytes,
            names.KV_BYTES: engine.kv_bytes,
            names.KV_USED: engine.kv_used_bytes,
            names.KV_BUDGET: engine.kv_budget_bytes,
            names.LEASES: status.leases,
        }
        models = [] if status.model is None else [self._label(status.model)]
        for named, value in values.items():
            yield _gauge(named, [((model,), value) for model in models])
        adapters = [((self._label(each.name),), each.bytes) for each in engine.adapters]
        yield _gauge(names.ADAPTERS, adapters)
        kind = (
            *(str(status.device), str(status.dtype), status.quantization, str(status.kernels)),
            status.isa,
            engine.mode,
        )
        yield _gauge(names.INFO, [((model, *kind), 1) for model in models])


def _gauge(named: Named, samples: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    gauge = GaugeMetricFamily(named.name, named.help, labels=named.labels)
    for labels, value in samples:
        gauge.add_metric(labels, value)
    return gauge


def _cumulated(named: Named, tally: Tally) -> tuple[list[tuple[str, float]], float]:
    """The buckets of a histogram, and the sum of its values."""
    bounds = [*(str(float(bound)) for bound in named.buckets), "+Inf"]
    return [*zip(bounds, accumulate(list(tally.counts)), strict=True)], tally.total


_CONSTRAINT_FAILURES: Mapping[type[ApiError], str] = {
    ConstraintRefused: "refused",
    ConstraintsUnavailable: "unavailable",
    ConstraintFailed: "failed",
}
_WRONG = "invalid_request"  # of errors without a code of their own


def _codes() -> Iterator[str]:
    kinds: list[type[ApiError]] = [ApiError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.__module__ == errors.__name__ and kind.code:
            yield kind.code
    yield _WRONG
