"""Traces, and logs. One trace a request; its spans are the step names of docs/architecture.md, over all processes.

Spans are recorded after the fact, from instants of this process's monotonic clock. Between processes only the W3C
trace context travels, never an instant. Whether a request is traced is decided once, with its root span. Export is off
unless OTEL_EXPORTER_OTLP_ENDPOINT or --trace-file is given; its queue is bounded and drops, so a slow or absent collector
never slows serving. No prompt or output text, ever.
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
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from splitfire.core.errors import ConfigError

log = structlog.get_logger("telemetry")
STEPS = ("accept", "admit", "place", "dispatch", "prefill", "ship", "first_token", "join", "decode", "stream")
SHUTDOWN_S = 2.0
END = b"\n]"  # of a trace file
Attributes = Mapping[str, str | int | float | bool]  # of a span
SCOPE = InstrumentationScope("splitfire")
_propagator = TraceContextTextMapPropagator()


class Telemetry:
    """This process's tracer. Off, every call returns at once."""

    def __init__(self, service: str, trace_file: Path | None, instance: str = "") -> None:
        """ConfigError when the file cannot be written, or the collector's address is none."""
        self._provider: TracerProvider | None = None
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self.resource = ServiceResource.of(service, instance)
        self._processors: list[SpanProcessor] = []
        if has_collector("TRACES"):
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - 60 ms, only if used

            self._processors.append(BatchSpanProcessor(OTLPSpanExporter(timeout=2)))
        if trace_file is not None:
            self._processors.append(BatchSpanProcessor(PerfettoExporter(trace_file, service), schedule_delay_millis=200))
        if self._processors:  # a tracer's sampler, by OpenTelemetry's own variables; spans are made here
            self._provider = TracerProvider(resource=self.resource, shutdown_on_exit=False)
            for processor in self._processors:
                self._provider.add_span_processor(processor)

    @property
    def is_on(self) -> bool:
        return self._provider is not None

    def begin_request(self, traceparent: str, began: float) -> RequestTrace:
        """The root span of a request, under the client's own context if it sent one. Whether it is recorded is the sampler's word."""
        if self._provider is None:
            return NO_TRACE
        around = _propagator.extract({"traceparent": traceparent}) if traceparent else None
        parent: SpanContext | None = trace.get_current_span(around).get_span_context()
        parent = parent if parent is not None and parent.is_valid else None
        ids = self._provider.id_generator
        trace_id = parent.trace_id if parent is not None else ids.generate_trace_id()
        decision = self._provider.sampler.should_sample(around, trace_id, "request", SpanKind.SERVER).decision
        flags = TraceFlags(TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT)
        return RequestTrace(SpanContext(trace_id, ids.generate_span_id(), False, flags), parent, began)

    def end_request(self, request: RequestTrace, ended: float, attributes: Attributes) -> None:
        if request.context is not None and request.context.trace_flags.sampled:
            self._tell("request", request.context, request.parent, request.began, ended, attributes, SpanKind.SERVER)

    def record(self, step: str, traceparent: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
        """One finished span under `traceparent`. Instants are seconds of time.monotonic() in this process."""
        if self._provider is None or not traceparent or (parent := _parent_of(traceparent)) is None:
            return
        context = SpanContext(parent.trace_id, self._provider.id_generator.generate_span_id(), False, parent.trace_flags)
        self._tell(step, context, parent, began, ended, attributes)

    def _tell(
        self, name: str, context: SpanContext, parent: SpanContext | None, began: float, ended: float, attributes: Attributes | None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:  # fmt: skip
        """The processors get what a span is once it has ended. A tracer's own spans are made to be changed by many threads, which takes
        three times as long, ten times a request."""
        span = ReadableSpan(
            name, context, parent, self.resource, attributes, kind=kind, start_time=self._instant(began),
            end_time=self._instant(max(began, ended)), instrumentation_scope=SCOPE,
        )  # fmt: skip
        for processor in self._processors:
            processor.on_end(span)

    def shutdown(self) -> None:
        """Exports what is left, but never waits longer than SHUTDOWN_S for it."""
        if self._provider is not None:
            thread = threading.Thread(target=self._provider.shutdown, name="telemetry-shutdown", daemon=True)
            thread.start()
            thread.join(SHUTDOWN_S)

    def _instant(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)


class ServiceResource(Resource):
    """What all that this process exports is said to come from. The exporter looks it up for every span, and the library's hash of it is
    one of its text as JSON."""

    @classmethod
    def of(cls, service: str, instance: str) -> ServiceResource:
        given = {"service.name": service, **({"service.instance.id": instance} if instance else {})}
        made = Resource.create(given)
        return cls(made.attributes, made.schema_url)

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)

    def __hash__(self) -> int:
        return self._hash


@lru_cache(maxsize=256)
def _parent_of(traceparent: str) -> SpanContext | None:
    """Reading it takes as long as recording a span, and a request has several. None: it is not sampled."""
    context = trace.get_current_span(_propagator.extract({"traceparent": traceparent})).get_span_context()
    return context if context.is_valid and context.trace_flags.sampled else None


class RequestTrace:
    """A request's root span until it ends, and what its trace is called elsewhere: empty where there is none."""

    def __init__(self, context: SpanContext | None, parent: SpanContext | None = None, began: float = 0.0) -> None:
        self.context = context
        self.parent = parent
        self.began = began
        self.traceparent = self.trace_id = ""
        if context is not None:
            self.trace_id = f"{context.trace_id:032x}"
            self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"  # W3C Trace Context


NO_TRACE = RequestTrace(None)


class PerfettoExporter(SpanExporter):
    """Chrome trace events, one file for all processes of a host; the file is valid JSON after every write.

    Each request gets a lane of its own in each process, so that spans that overlap stay readable.
    """

    def __init__(self, path: Path, service: str) -> None:
        self._path = path
        self._pid = os.getpid()
        try:
            self._append([{"name": "process_name", "ph": "M", "pid": self._pid, "args": {"name": service}}], is_first=True)
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

    def _append(self, events: Sequence[Mapping[str, object]], *, is_first: bool = False) -> None:
        lines = ",\n".join(json.dumps(event) for event in events).encode()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # all processes of a host begin at once
            size = os.fstat(descriptor).st_size
            if is_first and size and not _is_trace(descriptor, size):
                raise ConfigError(f"trace_file {self._path}: holds something else; give a new file")
            at = max(0, size - len(END))
            try:
                _write_at(descriptor, (b",\n" if size else b"[\n") + lines + END, at)
            except OSError:  # such as a full disk: what was there is whole again
                os.ftruncate(descriptor, size)
                _write_at(descriptor, END if size else b"", at)
                raise
        finally:
            os.close(descriptor)


def _write_at(descriptor: int, data: bytes, at: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count


def has_collector(signal: str) -> bool:
    """By OpenTelemetry's own variables; ConfigError when the address is none."""
    endpoint = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not endpoint or os.environ.get(f"OTEL_{signal}_EXPORTER") == "none":
        return False
    _check_endpoint(endpoint)
    return True


def _is_trace(descriptor: int, size: int) -> bool:
    """Whether it ends as our files do; what follows is written over that end."""
    return os.pread(descriptor, 2, 0) == b"[\n" and os.pread(descriptor, len(END), max(2, size - len(END))) == END


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
