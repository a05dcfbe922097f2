"""The metrics of several replicas as one text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


def summed(replicas: Mapping[str, Iterable[Metric]]) -> bytes:
    """For Prometheus, each sample with a label ``replica``; those of one replica that are alike are added up."""
    registry = CollectorRegistry()
    registry.register(_Replicas(replicas))
    return generate_latest(registry)


class _Replicas(Collector):
    def __init__(self, replicas: Mapping[str, Iterable[Metric]]) -> None:
        self._families: dict[str, Metric] = {}
        values: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for replica, metrics in replicas.items():
            for metric in metrics:
                self._families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    if not sample.name.endswith("_created"):  # times, which have no sum
                        key = metric.name, sample.name, (*sample.labels.items(), ("replica", replica))
                        values[key] = values.get(key, 0.0) + sample.value
        for (family, name, labels), value in values.items():
            self._families[family].add_sample(name, dict(labels), value)

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()
