"""One trace a request: the ten steps as spans over three processes, in Perfetto's file and at an OTLP collector."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from splitfire.core.telemetry import STEPS
from tests.e2e.fleets import greedy, start_fleet, until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_the_trace_file_shows_ten_steps_over_three_processes(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with start_fleet("pico", shared=(f"--trace-file={path}",)) as fleet:
        summary = fleet.generate(greedy(range(100, 400), 8))[0].summary
        assert len(summary.trace_id) == 32
        until(lambda: {e["name"] for e in spans(path, summary.trace_id)} >= set(STEPS), 5, lambda: path.read_text())
        found = spans(path, summary.trace_id)
        processes = {e["pid"]: e["args"]["name"] for e in json.loads(path.read_text()) if e["ph"] == "M"}
    by_name = {e["name"]: processes[e["pid"]] for e in found}
    assert set(by_name) == {*STEPS, "request"}
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


def spans(path: Path, trace_id: str) -> list[dict[str, object]]:
    events = json.loads(path.read_text())
    return [e for e in events if e["ph"] == "X" and e["args"]["trace_id"] == trace_id]


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


def test_a_collector_that_is_down_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """F68, F69."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with start_fleet("pico") as fleet:
        assert len(fleet.ids(count=20)) == 20
        children = [c.process for c in fleet.fleet.children if c.process is not None]
        for process in children:
            process.terminate()
        assert [process.wait(8) for process in children] == [0, 0, 0]
