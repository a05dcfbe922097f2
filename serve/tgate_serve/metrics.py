"""What a server has done and is doing, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from tgate_serve.model import Model

_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters and histograms of one server. Thread-safe."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        """``models`` by the names that they are served under; it is read at every scrape."""
        self.jobs: Callable[[], Mapping[str, int]] = dict
        """How many videos there are by status, asked at every scrape; whoever keeps them sets it."""
        self.registry = CollectorRegistry()
        self.registry.register(_Workers(models))
        self.registry.register(_Jobs(self))
        kind: dict[str, Any] = {"registry": self.registry, "labelnames": ("model",)}
        of_graph: dict[str, Any] = {"registry": self.registry, "labelnames": ("model", "size", "graph")}
        self._answers = Counter(
            "tgate_requests", "Requests that were answered, by HTTP status", ("route", "status"), registry=self.registry
        )
        self._queue = Histogram(
            "tgate_queue_seconds",
            "From a request's arrival until its first image had a row",
            buckets=_REQUEST_S,
            **kind,
        )
        self._request = Histogram(
            "tgate_request_seconds",
            "From a request's arrival until its pictures were there",
            buckets=_REQUEST_S,
            **kind,
        )
        self._decode = Histogram(
            "tgate_decode_seconds", "Decoding a request's pictures and compressing them", buckets=_STEP_S, **kind
        )
        self._step = Histogram("tgate_step_seconds", "Calls inside the engine", buckets=_STEP_S, **of_graph)
        self._images = Histogram("tgate_step_images", "Images that shared a call", buckets=_IMAGES, **of_graph)

    def on_call(self, model: str) -> Callable[[str, str, int, float], None]:
        """What a model's worker tells its calls to: size, graph, images, seconds."""

        def called(size: str, graph: str, images: int, seconds: float) -> None:
            self._step.labels(model, size, graph).observe(seconds)
            self._images.labels(model, size, graph).observe(images)

        return called

    def answered(self, route: str, status: int) -> None:
        """A request to a route, as OpenAPI writes it, was answered."""
        self._answers.labels(route, status).inc()

    def drawn(self, model: str, *, queue_s: float, decode_s: float, request_s: float) -> None:
        """A request is through."""
        self._queue.labels(model).observe(queue_s)
        self._decode.labels(model).observe(decode_s)
        self._request.labels(model).observe(request_s)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _Workers(Collector):
    """What workers count by themselves."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        images = GaugeMetricFamily("tgate_images", "Images that are there now", labels=("model", "state"))
        ended = CounterMetricFamily("tgate_images_ended", "Images that have left", labels=("model", "how"))
        rejected = CounterMetricFamily(
            "tgate_requests_rejected", "Requests that found the queue full", labels=("model",)
        )
        moves = CounterMetricFamily("tgate_moves", "Images that were moved from row to row", labels=("model",))
        moved = CounterMetricFamily("tgate_moved_bytes", "What those moves copied", labels=("model",))
        planned = GaugeMetricFamily("tgate_planned_bytes", "Weights, buffers and the hungriest call", labels=("model",))
        for name, model in list(self._models.items()):
            counts = model.worker.counts
            running, waiting = model.worker.load()
            images.add_metric((name, "running"), running)
            images.add_metric((name, "waiting"), waiting)
            for how, count in (
                ("through", counts.images),
                ("cancelled", counts.cancelled),
                ("expired", counts.expired),
                ("failed", counts.failed),
            ):
                ended.add_metric((name, how), count)
            rejected.add_metric((name,), counts.refused)
            moves.add_metric((name,), counts.moves)
            moved.add_metric((name,), counts.moved_bytes)
            planned.add_metric((name,), model.worker.planned_bytes)
        yield from (images, ended, rejected, moves, moved, planned)


class _Jobs(Collector):
    """The videos that are kept."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        kept = GaugeMetricFamily("tgate_jobs", "Videos that are kept now", labels=("status",))
        for status, count in self._metrics.jobs().items():
            kept.add_metric((status,), count)
        yield kept
