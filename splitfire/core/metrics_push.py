"""Metrics for an OTLP collector: once a minute what the metrics port would show, read the same way. Nothing is counted twice, and
nothing costs anything in between. Names that OpenTelemetry has are told by them. Only loaded when a collector is given.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import structlog
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    MetricExporter,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Metric as OtelMetric
from opentelemetry.sdk.resources import Resource
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from splitfire.core.errors import ConfigError
from splitfire.core.metrics import OtelName, Owned
from splitfire.core.telemetry import SCOPE

log = structlog.get_logger("metrics")
EVERY = "OTEL_METRIC_EXPORT_INTERVAL"  # milliseconds
CUMULATIVE = AggregationTemporality.CUMULATIVE
Labels = tuple[tuple[str, str], ...]


class MetricsPush:
    """Begins at once. `collect` and `post` as for the metrics port; families called `vllm:` stay there."""

    def __init__(
        self, resource: Resource, collect: Callable[[], list[Metric]], post: Callable[[Callable[[], None]], object],
        names: Mapping[str, OtelName], exporter: MetricExporter | None = None,
    ) -> None:  # fmt: skip
        """ConfigError when the interval is none."""
        self._every_s = _interval_s()
        self._exporter = exporter if exporter is not None else OTLPMetricExporter(timeout=2)
        self._resource = resource
        self._source = Owned(collect, post)
        self._names = names
        self._began_ns = time.time_ns()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-push", daemon=True)
        self._thread.start()

    def close(self, within_s: float) -> None:
        """Pushes what is new, if that can be done in time. Not on the thread that owns the metrics: it is asked for them."""
        self._is_over.set()
        self._thread.join(within_s)

    def _run(self) -> None:
        while not self._is_over.wait(self._every_s):
            self._push()
        self._push()
        self._exporter.shutdown(timeout_millis=1000)

    def _push(self) -> None:
        try:
            self._exporter.export(self._told(time.time_ns()))
        except Exception as exc:  # a process that is busy ending, or does not answer
            log.warning("metrics cannot be pushed", error=type(exc).__name__)

    def _told(self, now_ns: int) -> MetricsData:
        found = [self._metric(family, now_ns) for family in self._source.collect() if not family.name.startswith("vllm:")]
        scope = ScopeMetrics(SCOPE, [metric for metric in found if metric.data.data_points], "")
        return MetricsData([ResourceMetrics(self._resource, [scope], self._resource.schema_url)])

    def _metric(self, family: Metric, now_ns: int) -> OtelMetric:
        known = self._names.get(family.name)
        name, labels = (known.name, known.labels) if known is not None else (family.name, {})
        unit = "s" if family.name.endswith("_seconds") else ""
        if family.type == "histogram":
            points = [self._histogram_point(at, samples, labels, now_ns) for at, samples in _by_labels(family.samples).items()]
            return OtelMetric(name, family.documentation, unit, Histogram(points, CUMULATIVE))
        samples = [s for s in family.samples if not s.name.endswith("_created")]
        numbers = [NumberDataPoint(_named(s.labels, labels), self._began_ns, now_ns, float(s.value)) for s in samples]
        if family.type == "counter":  # a gauge may be called the same without that
            return OtelMetric(f"{name}_total", family.documentation, unit, Sum(numbers, CUMULATIVE, is_monotonic=True))
        return OtelMetric(name, family.documentation, unit, Gauge(numbers))

    def _histogram_point(self, at: Labels, samples: Sequence[Sample], labels: Mapping[str, str], now_ns: int) -> HistogramDataPoint:
        buckets = [(s.labels["le"], int(s.value)) for s in samples if s.name.endswith("_bucket")]
        total = next(s.value for s in samples if s.name.endswith("_sum"))
        counts = [count - before for (_, count), before in zip(buckets, (0, *(count for _, count in buckets)), strict=False)]
        bounds = [float(bound) for bound, _ in buckets if bound != "+Inf"]
        unknown = cast(float, None)  # the least and the greatest, which OTLP leaves out then
        return HistogramDataPoint(
            _named(dict(at), labels), self._began_ns, now_ns, buckets[-1][1], total, counts, bounds, unknown, unknown
        )


def _interval_s() -> float:
    given = os.environ.get(EVERY) or "60000"
    if not given.isdigit() or int(given) == 0:
        raise ConfigError(f"{EVERY}: is {given!r}, accepted: milliseconds, such as 60000")
    return int(given) / 1000


def _by_labels(samples: Iterable[Sample]) -> Mapping[Labels, list[Sample]]:
    """Of one histogram, without what tells its buckets apart."""
    found: dict[Labels, list[Sample]] = {}
    for sample in samples:
        if not sample.name.endswith("_created"):
            found.setdefault(tuple((k, v) for k, v in sample.labels.items() if k != "le"), []).append(sample)
    return found


def _named(labels: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {names.get(label, label): value for label, value in labels.items() if value}
