"""Spans land in a file Perfetto opens; nothing is recorded when tracing is off; a dead collector is nobody's problem."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from splitfire.core.errors import ConfigError
from splitfire.core.telemetry import PerfettoExporter, Telemetry


def test_the_trace_file_is_valid_json_after_every_write(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    one, two = Telemetry("one", path), Telemetry("two", path)
    assert [e["ph"] for e in json.loads(path.read_text())] == ["M", "M"]
    request = one.begin_request("", 10.0)
    two.record("prefill", request.traceparent, 10.1, 10.2, {"splitfire.request_id": "r"})
    one.record("stream", request.traceparent, 10.2, 10.5)
    one.end_request(request, 10.5, {})
    two.shutdown()
    one.shutdown()
    events = [e for e in json.loads(path.read_text()) if e["ph"] == "X"]
    assert {e["name"] for e in events} == {"request", "prefill", "stream"}
    assert {e["args"]["trace_id"] for e in events} == {request.trace_id}
    [prefill] = [e for e in events if e["name"] == "prefill"]
    assert prefill["dur"] == pytest.approx(100_000, rel=1e-3)


def test_a_clients_own_trace_is_continued() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    telemetry = Telemetry("x", Path("/dev/null"))
    assert telemetry.begin_request(parent, 0.0).trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert telemetry.begin_request("nonsense", 0.0).trace_id not in ("", "0af7651916cd43dd8448eb211c80319c")


def test_what_is_not_sampled_is_not_recorded_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By OpenTelemetry's own variables, and by the client's context."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    path = tmp_path / "trace.json"
    telemetry = Telemetry("x", path)
    for traceparent, names in (("", set()), (parent + "0", set()), (parent + "1", {"request", "decode"})):
        request = telemetry.begin_request(traceparent, 0.0)
        assert request.traceparent.endswith("01" if names else "00")
        assert request.trace_id
        telemetry.record("decode", request.traceparent, 0.0, 1.0)
        telemetry.end_request(request, 1.0, {})
    telemetry.shutdown()
    assert {e["name"] for e in json.loads(path.read_text()) if e["ph"] == "X"} == {"request", "decode"}


def test_off_means_nothing_happens() -> None:
    telemetry = Telemetry("x", None)
    request = telemetry.begin_request("", 0.0)
    assert (request.traceparent, request.trace_id) == ("", "")
    telemetry.record("decode", request.traceparent, 0.0, 1.0)
    telemetry.shutdown()


def test_a_collector_that_is_down_does_not_hold_up_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """F68, F69: recording stays cheap, shutting down takes at most two seconds more."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    before = set(threading.enumerate())
    telemetry = Telemetry("x", None)
    request = telemetry.begin_request("", 0.0)
    began = time.perf_counter()
    for _ in range(5000):  # more than the queue holds
        telemetry.record("decode", request.traceparent, 0.0, 1.0)
    assert time.perf_counter() - began < 2.0
    began = time.perf_counter()
    telemetry.shutdown()
    assert time.perf_counter() - began < 3.0
    # The exporter's thread draws random pauses from the one generator that hypothesis watches: it must not outlive this test.
    for thread in set(threading.enumerate()) - before:
        thread.join(30.0)
        assert not thread.is_alive()


def test_a_trace_file_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for content in ("precious data", '{"a": 1}', "x"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="holds something else"):
            Telemetry("test", path)
        assert path.read_text() == content


def test_a_trace_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        Telemetry("test", tmp_path / "nowhere" / "trace.json")


@pytest.mark.parametrize("endpoint", ["ftp://x:1", "http://", "http://x:99999", "http://x:abc", "::"])
def test_a_collectors_address_that_is_none_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B115."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_ENDPOINT: is"):
        Telemetry("test", None)


def test_a_full_disk_leaves_the_trace_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F29: what does not fit is dropped, and what was there can still be read."""
    path = tmp_path / "trace.json"
    exporter = PerfettoExporter(path, "one")
    exporter._append([{"name": "a"}])
    before, real = path.read_text(), os.pwrite

    def full(descriptor: int, data: bytes, at: int) -> int:
        if len(data) > 8:
            if at + 8 > len(before) + 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data[:8], at)
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        exporter._append([{"name": "b" * 100}])
    assert path.read_text() == before
    monkeypatch.setattr(os, "pwrite", real)
    exporter._append([{"name": "c"}])
    assert [event["name"] for event in json.loads(path.read_text())] == ["process_name", "a", "c"]
