"""One trace a request: the ten steps as spans over three processes, in Perfetto's file and at an OTLP collector."""

from __future__ import annotations

import fcntl
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from splitfire.core.telemetry import STEPS
from tests.e2e.fleets import SLOW, generating, greedy, start_fleet, until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_the_trace_file_shows_ten_steps_over_three_processes(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with start_fleet("pico", shared=(f"--trace-file={path}",)) as fleet:
        summary = fleet.generate(greedy(range(100, 400), 8))[0].summary
        assert len(summary.trace_id) == 32
        until(lambda: {e["name"] for e in spans(path, summary.trace_id)} >= {*STEPS, "request"}, 10, lambda: path.read_text())
        found = spans(path, summary.trace_id)
        processes = {e["pid"]: e["args"]["name"] for e in events_of(path) if e["ph"] == "M"}
    by_name = {e["name"]: processes[e["pid"]] for e in found}
    assert len(found) == len(STEPS) + 1, "each once"
    router, prefill, decode = "splitfire-router", "splitfire-prefill", "splitfire-decode"
    assert {name for name, process in by_name.items() if process == router} == {
        "request",
        "accept",
        "admit",
        "place",
        "dispatch",
        "stream",
    }
    assert {name for name, process in by_name.items() if process == prefill} == {"prefill", "ship", "first_token"}
    assert {name for name, process in by_name.items() if process == decode} == {"join", "decode"}
    assert len({e["pid"] for e in found}) == 3


def spans(path: Path, trace_id: str) -> list[dict[str, Any]]:
    return [e for e in events_of(path) if e["ph"] == "X" and e["args"]["trace_id"] == trace_id]


def events_of(path: Path) -> list[dict[str, Any]]:
    """Between two processes that write."""
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        events: list[dict[str, Any]] = json.load(file)
    return events


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that only remembers."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []

    def Export(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def test_a_collector_gets_one_trace_with_the_clients_own_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    canary = "zebra quartz canary"
    with start_fleet("pico") as fleet:
        fleet.generate(greedy(range(50, 150), 6), metadata=(("traceparent", PARENT),))
        from splitfire.v1 import inference_pb2 as pb

        fleet.generate(pb.GenerateRequest(text=canary, stopping=pb.StoppingParams(max_tokens=3, ignore_eos=True)))
        until(lambda: {s.name for _, s in collector.spans if s.trace_id.hex() == PARENT[3:35]} >= {*STEPS, "request"}, 10)
        logs = "".join(child.log.read_text() for child in fleet.fleet.children)
    mine = [(service, span) for service, span in collector.spans if span.trace_id.hex() == PARENT[3:35]]
    [root] = [span for _, span in mine if span.name == "request"]
    assert root.parent_span_id.hex() == PARENT[36:52]
    assert {span.parent_span_id for _, span in mine if span.name != "request"} == {root.span_id}
    assert {service for service, _ in mine} == {"splitfire-router", "splitfire-prefill", "splitfire-decode"}
    # S15: no prompt text in spans or logs.
    everything = logs + "".join(str(span) for _, span in collector.spans)
    assert "zebra" not in everything
    server.stop(0)


def test_log_lines_of_a_request_name_its_trace(tmp_path: Path) -> None:
    flags = (f"--trace-file={tmp_path / 'trace.json'}",)
    with start_fleet("pico", decode=2, shared=flags, worker=SLOW) as fleet:
        call = fleet.stub.Generate(greedy(count=400), timeout=60)
        next(iter(call))
        fleet.process(generating(fleet)).kill()
        summary = next(response.summary for response in call if response.HasField("summary"))
        [router] = [child.log.read_text() for child in fleet.fleet.children if child.name.startswith("router")]
    lines = [json.loads(line) for line in router.splitlines() if '"attempt failed"' in line]
    assert lines
    assert {line["trace_id"] for line in lines} == {summary.trace_id}


class MetricsCollector(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Remembers the latest sums of histograms, by metric and attributes, and whose gauges and counters came."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, ...], int] = {}
        self.others: dict[tuple[str, str], float] = {}

    def Export(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        for resource in request.resource_metrics:
            about = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                for point in metric.histogram.data_points:
                    labels = (f"{a.key}={a.value.string_value}" for a in point.attributes)
                    self.counts[(metric.name, metric.unit, *sorted(labels))] = point.count
                for number in (*metric.gauge.data_points, *metric.sum.data_points):
                    self.others[about.get("service.instance.id", ""), metric.name] = number.as_double or number.as_int
        return metrics_service_pb2.ExportMetricsServiceResponse()


def test_a_collector_gets_every_processs_metrics_the_histograms_by_their_conventional_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collector = MetricsCollector()
    server = grpc.server(ThreadPoolExecutor(2))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "300")
    with start_fleet("pico") as fleet:
        fleet.ids(count=8)
        fleet.ids(count=8)
        model = "gen_ai.request.model=pico"
        for name in ("time_to_first_token", "time_per_output_token", "request.duration"):
            key = (f"gen_ai.server.{name}", "s", model)
            until(lambda key=key: collector.counts.get(key) == 2, 10, lambda: str(collector.counts))  # type: ignore[misc]
        until(lambda: collector.counts.get(("splitfire.phase.duration", "s", "leg=first_token", "phase=prefill")) == 2, 10)
        until(lambda: ("decode-0", "splitfire_kv_blocks") in collector.others, 10, lambda: str(collector.others))
    assert any(instance.startswith("router-") and name == "splitfire_requests" for instance, name in collector.others)
    server.stop(0)


def test_a_collector_that_is_down_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """F68, F69."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with start_fleet("pico") as fleet:
        assert len(fleet.ids(count=20)) == 20
        children = [c.process for c in fleet.fleet.children if c.process is not None]
        for process in children:
            process.terminate()
        assert [process.wait(8) for process in children] == [0, 0, 0]
