"""A collector gets the numbers of the metrics port, by OpenTelemetry's names; one that is away is nobody's problem."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from prometheus_client import Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from splitfire.core.errors import ConfigError
from splitfire.core.metrics import OtelName, counter, gauge
from splitfire.core.metrics_push import EVERY, MetricsPush

NAMES = {"some_seconds": OtelName("some.duration", {"some_model": "some.model"})}
RESOURCE = Resource({"service.name": "x"})


class Kept(MetricExporter):
    """Keeps what it gets as it would be sent."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.got: list[Any] = []
        self.came = threading.Event()
        self._error = error

    def export(self, metrics_data: MetricsData, timeout_millis: float = 0, **_: Any) -> MetricExportResult:
        self.came.set()
        if self._error is not None:
            raise self._error
        [resource] = encode_metrics(metrics_data).resource_metrics
        self.got.append({metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics})
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None: ...


def at_once(tell: Callable[[], None]) -> None:
    tell()


def pushed(*families: Metric) -> dict[str, Any]:
    kept = Kept()
    MetricsPush(RESOURCE, lambda: [*families], at_once, NAMES, kept).close(5.0)
    [metrics] = kept.got
    return dict(metrics)


def labels(point: Any) -> dict[str, str]:
    return {attribute.key: attribute.value.string_value for attribute in point.attributes}


def test_a_histograms_buckets_are_counted_each_for_itself() -> None:
    histogram = Histogram("some_seconds", "Some", ("some_model", "error_type"), buckets=(0.1, 1.0), registry=None)
    for seconds in (0.05, 0.5, 0.6, 7.0):
        histogram.labels("m", "").observe(seconds)
    histogram.labels("m", "late").observe(0.01)
    metric = pushed(*histogram.collect())["some.duration"]
    good, bad = metric.histogram.data_points
    assert (metric.unit, list(good.explicit_bounds), list(good.bucket_counts), good.count) == ("s", [0.1, 1.0], [1, 2, 1], 4)
    assert good.sum == pytest.approx(8.15)
    assert not good.HasField("min")
    assert not good.HasField("max")
    assert (labels(good), labels(bad)) == ({"some.model": "m"}, {"some.model": "m", "error_type": "late"})


def test_gauges_and_counters_keep_apart_and_their_names() -> None:
    told = pushed(
        gauge("requests", "Now", ("state",), [(("running",), 3)]),
        counter("requests", "Over", ("outcome",), [(("ok",), 40), (("cancelled",), 2)]),
    )
    assert [(labels(p), p.as_double) for p in told["splitfire_requests"].gauge.data_points] == [({"state": "running"}, 3.0)]
    over = told["splitfire_requests_total"].sum
    assert over.is_monotonic
    assert {labels(p)["outcome"]: p.as_double for p in over.data_points} == {"ok": 40.0, "cancelled": 2.0}


def test_what_is_empty_or_another_engines_name_is_not_sent() -> None:
    other = GaugeMetricFamily("vllm:num_requests_running", "As vLLM has it")
    other.add_metric((), 1.0)
    assert pushed(other, gauge("nothing", "Not yet", ("x",), [])) == {}


def test_it_goes_on_where_a_collector_or_the_process_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVERY, "10")
    kept = Kept(RuntimeError("away"))
    push = MetricsPush(RESOURCE, list, at_once, NAMES, kept)
    for _ in range(3):
        assert kept.came.wait(5.0)
        kept.came.clear()
    push.close(5.0)


@pytest.mark.parametrize("given", ["0", "-1", "soon", "1.5"])
def test_an_interval_that_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVERY, given)
    with pytest.raises(ConfigError, match=f"{EVERY}: is '{given}', accepted: milliseconds, such as 60000"):
        MetricsPush(RESOURCE, list, at_once, NAMES, Kept())
