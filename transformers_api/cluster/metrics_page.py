"""One page of metrics for a front and its replicas: theirs have a label ``replica``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

REPLICA = "replica"


def merged(own: bytes, others: Iterable[tuple[str, bytes]]) -> bytes:
    """``own``, and the samples of (replica, page) each under the metric that they are of."""
    families = {family.name: family for family in _families(own)}
    for name, page in others:
        for family in _families(page):
            target = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            target.samples += [_labelled(sample, name) for sample in family.samples]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families.values()))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _families(page: bytes) -> Iterator[Metric]:
    yield from text_string_to_metric_families(page.decode())


def _labelled(sample: Sample, replica: str) -> Sample:
    return Sample(sample.name, {**sample.labels, REPLICA: replica}, sample.value)
