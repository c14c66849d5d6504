"""Traces and logs. One trace a request; its spans are the step names of docs/architecture.md, over all processes.

Spans are recorded after the fact, from instants of this process's monotonic clock. Between processes only the W3C
trace context travels, never an instant. Export is off unless OTEL_EXPORTER_OTLP_ENDPOINT or --trace-file is given; its
queue is bounded and drops, so a slow or absent collector never slows serving. No prompt or output text, ever.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from splitfire.core.errors import ConfigError

log = structlog.get_logger("telemetry")
STEPS = ("accept", "admit", "place", "dispatch", "prefill", "ship", "first_token", "join", "decode", "stream")
SHUTDOWN_S = 2.0
Attributes = Mapping[str, str | int | float | bool]  # of a span
_propagator = TraceContextTextMapPropagator()


class Telemetry:
    """This process's tracer. Off, every call returns at once."""

    def __init__(self, service: str, trace_file: Path | None) -> None:
        """ConfigError when the file cannot be written, or the collector's address is none."""
        self._provider: TracerProvider | None = None
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        has_collector = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{kind}") for kind in ("ENDPOINT", "TRACES_ENDPOINT"))
        if not has_collector and trace_file is None:
            return
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        if has_collector:
            _check_endpoint(
                os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
            )
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - 60 ms, only if used

            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=2)))
        if trace_file is not None:
            self._provider.add_span_processor(BatchSpanProcessor(PerfettoExporter(trace_file, service), schedule_delay_millis=200))
        self._tracer = self._provider.get_tracer("splitfire")

    @property
    def is_on(self) -> bool:
        return self._provider is not None

    def begin_request(self, traceparent: str, began: float) -> RequestTrace:
        """The root span of a request, under the client's own context if it sent one."""
        if self._provider is None:
            return RequestTrace(None)
        context = _propagator.extract({"traceparent": traceparent}) if traceparent else None
        span = self._tracer.start_span("request", context=context, kind=trace.SpanKind.SERVER, start_time=self._instant(began))
        return RequestTrace(span)

    def end_request(self, request: RequestTrace, ended: float, attributes: Attributes) -> None:
        if request.span is not None:
            request.span.set_attributes(dict(attributes))
            request.span.end(end_time=self._instant(ended))

    def record(self, step: str, traceparent: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
        """One finished span under `traceparent`. Instants are seconds of time.monotonic() in this process."""
        if self._provider is None or not traceparent:
            return
        context = _propagator.extract({"traceparent": traceparent})
        span = self._tracer.start_span(step, context=context, start_time=self._instant(began), attributes=dict(attributes or {}))
        span.end(end_time=self._instant(max(began, ended)))

    def shutdown(self) -> None:
        """Exports what is left, but never waits longer than SHUTDOWN_S for it."""
        if self._provider is None:
            return
        thread = threading.Thread(target=self._provider.shutdown, name="telemetry-shutdown", daemon=True)
        thread.start()
        thread.join(SHUTDOWN_S)

    def _instant(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)


class RequestTrace:
    """What a request's trace is called elsewhere."""

    def __init__(self, span: trace.Span | None) -> None:
        self.span = span
        carrier: dict[str, str] = {}
        if span is not None:
            _propagator.inject(carrier, trace.set_span_in_context(span))
        self.traceparent = carrier.get("traceparent", "")
        self.trace_id = f"{span.get_span_context().trace_id:032x}" if span is not None else ""


class PerfettoExporter(SpanExporter):
    """Chrome trace events, one file for all processes of a host; the file is valid JSON after every write.

    Each request gets a lane of its own in each process, so that spans that overlap stay readable.
    """

    def __init__(self, path: Path, service: str) -> None:
        self._path = path
        self._pid = os.getpid()
        try:
            if path.exists() and path.stat().st_size and not _is_trace(path):
                raise ConfigError(f"trace_file {path}: holds something else; give a new file")
            self._append([{"name": "process_name", "ph": "M", "pid": self._pid, "args": {"name": service}}])
        except OSError as exc:
            raise ConfigError(f"trace_file {path}: {exc.strerror or exc}") from exc

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            self._append([self._event(span) for span in spans])
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _event(self, span: ReadableSpan) -> dict[str, object]:
        context = span.get_span_context()
        trace_id = context.trace_id if context is not None else 0
        begin, end = span.start_time or 0, span.end_time or 0
        return {
            "name": span.name, "cat": "splitfire", "ph": "X", "ts": begin / 1000, "dur": (end - begin) / 1000,
            "pid": self._pid, "tid": trace_id % 1_000_000, "args": {"trace_id": f"{trace_id:032x}", **dict(span.attributes or {})},
        }  # fmt: skip

    def _append(self, events: Sequence[Mapping[str, object]]) -> None:
        lines = ",\n".join(json.dumps(event) for event in events).encode()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                file.write(b"[\n" + lines + b"\n]")
            else:
                file.seek(size - 2)  # over the closing "\n]"
                file.write(b",\n" + lines + b"\n]")


def _is_trace(path: Path) -> bool:
    """Whether it ends as our files do; what follows is written over that end."""
    with path.open("rb") as file:
        begin = file.read(2)
        file.seek(max(2, path.stat().st_size - 2))
        return begin == b"[\n" and file.read() == b"\n]"


def _check_endpoint(endpoint: str) -> None:
    parsed = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    try:
        is_good = parsed.scheme in ("", "http", "https") and bool(parsed.hostname) and parsed.port != 0
    except ValueError:  # of the port
        is_good = False
    if not is_good:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT: is {endpoint!r}, accepted: http://host:port, https://host:port or host:port"
        )
    if (parsed.hostname or "").startswith("169.254."):
        log.warning("spans go to a link-local address, where clouds keep their metadata service", endpoint=endpoint)


def configure_logging(service: str, level: str) -> None:
    """One JSON object a line on stderr; short coloured lines when a person is looking."""
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    if sys.stderr.isatty():
        # Plain tracebacks: the default shows local variables, which may be somebody's prompt.
        processors.append(structlog.dev.ConsoleRenderer(pad_event_to=0, exception_formatter=structlog.dev.plain_traceback))
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
