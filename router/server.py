"""The router process: two ports, one for clients and one for workers, and what stands between them. Event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import replace

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection
from tokenizers import Tokenizer

from router.admission import Admission, AdmissionLimits
from router.fleet import Fleet
from router.fleet_api import FleetService
from router.flow import Flow
from router.formats import FormatPool
from router.grpc_api import SERVICE, InferenceApi, ServedModel
from router.placement import Placement, missing_role
from router.text import TextPool
from splitfire.core import limits
from splitfire.core.errors import ConfigError
from splitfire.core.model_dir import ModelDir, others_who_may_change
from splitfire.core.model_source import served_name
from splitfire.core.settings import LOOPBACK, RouterSettings, read_secret
from splitfire.core.telemetry import Telemetry
from splitfire.core.validation import ModelLimits
from splitfire.v1 import fleet_pb2_grpc

log = structlog.get_logger("router")
TICK_S = 0.5
SHUTDOWN_S = 3.0  # for saying goodbye; the process ends whatever happens
KEEPALIVE = (
    ("grpc.keepalive_time_ms", int(limits.KEEPALIVE_TIME_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(limits.KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),
)
PUBLIC_OPTIONS = (
    *KEEPALIVE,
    ("grpc.max_connection_idle_ms", int(limits.MAX_CONNECTION_IDLE_S * 1000)),
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", limits.MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", limits.MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", limits.MAX_STREAMS_PER_CONNECTION),
)
WORKER_OPTIONS = (
    *KEEPALIVE,
    ("grpc.max_receive_message_length", limits.MAX_FLEET_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_FLEET_MESSAGE_BYTES),
    ("grpc.max_metadata_size", limits.MAX_METADATA_BYTES),
)


class RouterServer:
    """`start`, then `run` until drained."""

    def __init__(self, settings: RouterSettings, model: ModelDir) -> None:
        self.settings = settings
        self.telemetry = Telemetry("splitfire-router", settings.trace_file)
        self._text = TextPool(model)
        self._formats = FormatPool(model)
        self._fleet = Fleet(model, self._on_change)
        admission_limits = AdmissionLimits(
            settings.max_requests, settings.max_queued, limits.MAX_QUEUED_BYTES, settings.max_queued_s
        )
        self._admission: Admission[Placement] = Admission(admission_limits, time.monotonic)
        self._flow = Flow(self._fleet, self._admission, self.telemetry, settings.split, model.config.vocab_size)
        self._base_limits = ModelLimits(
            name=settings.model_name or served_name(settings.model, model.path),
            vocab_size=model.config.vocab_size,
            context_length=settings.max_context or model.config.max_positions,
            eos_token_ids=model.config.eos_token_ids,
            defaults=model.generation,
            has_chat_template=model.chat_template is not None,
        )
        self._worker_ports: list[str] = []
        self._model = model
        self._is_draining = False
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._health = HealthServicer()
        self._public = grpc.aio.server(options=PUBLIC_OPTIONS)
        self._private = grpc.aio.server(options=WORKER_OPTIONS)
        self.port = self.worker_port = 0

    async def start(self) -> None:
        """ConfigError when the tokenizer cannot be used or a port cannot be had."""
        settings = self.settings
        token = read_secret(settings.fleet_token_file) if settings.fleet_token_file else None
        await self._text.start()
        served = ServedModel(self._limits, Tokenizer.from_file(str(self._model.tokenizer_path)), self._text, self._formats)
        self._api = InferenceApi(served, self._fleet, self._flow, self.telemetry, self._worker_ports)
        self._public.add_generic_rpc_handlers((self._api.handlers(),))
        add_HealthServicer_to_server(self._health, self._public)
        has_reflection = settings.reflection if settings.reflection is not None else settings.host in LOOPBACK
        if has_reflection:
            reflection.enable_server_reflection((SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), self._public)
        fleet_pb2_grpc.add_FleetServicer_to_server(FleetService(self._fleet, secrets.token_hex(4), token), self._private)
        self.port = _listen(self._public, "port", settings.host, settings.port)
        self.worker_port = _listen(self._private, "worker_port", settings.worker_host, settings.worker_port)
        self._worker_ports.append(f"{settings.worker_host}:{self.worker_port}")
        metrics_port = self._open_metrics()
        await self._tell_health()
        await self._private.start()
        await self._public.start()
        if settings.insecure:
            log.warning(
                "insecure: no TLS, anybody who reaches these ports may use them",
                host=settings.host,
                worker_host=settings.worker_host,
                metrics_host=settings.metrics_host,
            )
        if others := others_who_may_change(self._model.path):
            log.warning("others can change the model directory", path=str(self._model.path), others=others)
        log.info(
            "ready",
            model=self._base_limits.name,
            address=f"{settings.host}:{self.port}",
            worker_address=self._worker_ports[0],
            metrics_port=metrics_port,
        )

    async def run(self) -> int:
        """Until drained; the exit code."""
        ticker = asyncio.create_task(self._tick(), name="router-tick")
        await self._stopped.wait()
        ticker.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.gather(ticker, return_exceptions=True)
                await self._public.stop(0.5)
                await self._private.stop(0.5)
                await self._text.close()
                await self._formats.close()
        self.telemetry.shutdown()
        return 0

    def drain(self) -> None:
        """SIGTERM: refuse new requests, let open ones finish within the grace time. The second time: at once."""
        if self._is_draining:
            self._stopped.set()
            return
        self._is_draining = self._api.is_draining = True
        log.info("draining", requests=self._api.num_active, grace_s=self.settings.router_grace_s)
        asyncio.get_running_loop().call_later(self.settings.router_grace_s, self._stopped.set)
        self._changed.set()

    def _open_metrics(self) -> int | None:
        """The port, if there is to be one."""
        settings = self.settings
        if settings.metrics_port is None:
            return None
        from router.metrics import RouterMetrics  # noqa: PLC0415 - 60 ms, only if used
        from splitfire.core.metrics import MetricsPort  # noqa: PLC0415

        metrics = RouterMetrics(self._fleet, lambda: self._admission.num_running, lambda: self._admission.num_queued)
        post = asyncio.get_running_loop().call_soon_threadsafe
        return MetricsPort(settings.metrics_host, settings.metrics_port, metrics.collect, post).port

    def _limits(self) -> ModelLimits:
        shortest = self._fleet.max_context
        length = self._base_limits.context_length
        return replace(self._base_limits, context_length=min(length, shortest or length), pool_tokens=self._fleet.pool_tokens)

    def _on_change(self) -> None:
        """Workers came, went, or have room: whoever waits may start."""
        self._changed.set()
        self._admission.pump()

    async def _tick(self) -> None:
        """Keeps health true and queues moving; ends the process when a drain is done."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            self._changed.clear()
            self._fleet.drop_silent()
            self._admission.pump()
            await self._tell_health()
            if self._is_draining and self._api.num_active == 0:
                self._stopped.set()

    async def _tell_health(self) -> None:
        """SERVING exactly when a request could be placed."""
        can_serve = not self._is_draining and missing_role(self._fleet.snapshot(), self.settings.split) is None
        status = health_pb2.HealthCheckResponse.SERVING if can_serve else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)


def _listen(server: grpc.aio.Server, setting: str, host: str, port: int) -> int:
    try:
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as exc:
        flag = setting.replace("_", "-")
        raise ConfigError(
            f"{setting}: cannot listen on {host}:{port}: in use (`ss -ltnp` shows by whom) or not allowed; choose another with --{flag}"
        ) from exc
