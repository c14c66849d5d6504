"""The metrics port: Prometheus text over HTTP, read at scrape time, so that nothing costs anything while nobody asks.

One thread serves one connection after another; each gets ANSWER_S. What is shown belongs to the service's own thread, which
is asked for it. Only loaded when somebody wants metrics.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from splitfire.core.errors import ConfigError

log = structlog.get_logger("metrics")
disable_created_metrics()  # type: ignore[no-untyped-call]  # a series of instants beside each histogram, which nobody reads
ANSWER_S = 5.0
READ_S = 2.0
PATH = "/metrics"
OPEN_METRICS = "application/openmetrics-text"


@dataclass(frozen=True, slots=True)
class OtelName:
    """What OpenTelemetry calls a metric, and its labels."""

    name: str
    labels: Mapping[str, str]


def gauge(name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """`rows`: the labels' values and the number; of two with the same values the last counts."""
    family = GaugeMetricFamily(f"splitfire_{name}", text, labels=labels)
    for values, number in dict(rows).items():
        family.add_metric(values, number)
    return family


def counter(name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """As `gauge`; the exposition adds `_total` to the name."""
    family = CounterMetricFamily(f"splitfire_{name}", text, labels=labels)
    for values, number in dict(rows).items():
        family.add_metric(values, number)
    return family


class MetricsPort:
    """Listens from the start. `post` runs something on the thread that owns what `collect` reads, as `call_soon_threadsafe` does."""

    def __init__(
        self, host: str, port: int, collect: Callable[[], list[Metric]], post: Callable[[Callable[[], None]], object]
    ) -> None:
        """ConfigError when it cannot listen there."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Owned(collect, post))
        ProcessCollector(registry=registry)
        try:
            self._server = _Server((host, port), registry)
        except OSError as exc:
            message = f"metrics_port: cannot listen on {host}:{port}: {exc.strerror or exc}; choose another with --metrics-port"
            raise ConfigError(message) from exc
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._serve, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._server.is_closed = True  # after that, for then the thread closes the socket

    def _serve(self) -> None:
        while not self._server.is_closed:
            self._server.handle_request()  # sleeps until somebody comes
        self._server.server_close()


class Owned(Collector):
    """Asks the thread that owns the numbers for them, and waits READ_S at most."""

    def __init__(self, collect: Callable[[], list[Metric]], post: Callable[[Callable[[], None]], object]) -> None:
        self._collect = collect
        self._post = post

    def collect(self) -> Iterable[Metric]:
        answer: Future[list[Metric]] = Future()

        def tell() -> None:
            try:
                answer.set_result(self._collect())
            except Exception as exc:
                answer.set_exception(exc)

        self._post(tell)
        return answer.result(READ_S)


class _Server(HTTPServer):
    """Ends every connection after ANSWER_S, however slowly it talks."""

    is_closed = False

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.registry = registry
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without the look-up of this host's name that HTTPServer does, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def finish_request(self, request: Any, client_address: Any) -> None:
        timer = threading.Timer(ANSWER_S, _hang_up, [request])
        timer.daemon = True
        timer.start()
        try:
            super().finish_request(request, client_address)
        finally:
            timer.cancel()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("scrape failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self.send_error(404, f"only {PATH} is here")
            return
        is_open = OPEN_METRICS in self.headers.get("Accept", "")
        try:
            body = _as_open_metrics(self.server.registry) if is_open else generate_latest(self.server.registry)
        except Exception as exc:
            log.warning("metrics cannot be read", error=type(exc).__name__)
            self.send_error(503, "the process does not answer")
            return
        self.send_response(200)
        self.send_header("Content-Type", f"{OPEN_METRICS}; version=1.0.0; charset=utf-8" if is_open else CONTENT_TYPE_PLAIN_0_0_4)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Scrapes are not news."""

    def version_string(self) -> str:
        return "splitfire"


def _as_open_metrics(registry: CollectorRegistry) -> bytes:
    """Exemplars travel in no other format. Every name is legal as it is; the library's default would write `vllm_` for `vllm:`."""
    return bytes(openmetrics.generate_latest(registry, escaping="allow-utf-8"))  # type: ignore[no-untyped-call]


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is over
        return
