"""The router process: two ports, one for clients and one for workers, and what stands between them. Event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import time
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection
from tokenizers import Tokenizer

from router.admin_api import SERVICE as ADMIN_SERVICE
from router.admin_api import AdminApi
from router.admission import Admission, AdmissionLimits
from router.canary import Canaries
from router.describe import Describer
from router.doors import Doors
from router.fleet import Fleet
from router.fleet_api import FleetService
from router.flow import Flow
from router.formats import FormatPool
from router.gate import Gate
from router.grpc_api import SERVICE, InferenceApi
from router.inference import Inference, ServedModel, Tenants
from router.placement import Rules, missing_role
from router.placing import Placing, Room
from router.policies import make_policy
from router.quotas import Quotas
from router.rebalance import Rebalancer
from router.recent import Recent
from router.text import TextPool
from router.usage import make_usage_log
from router.views import Scan
from splitfire.core import limits
from splitfire.core.errors import ConfigError
from splitfire.core.model_dir import ModelDir, others_who_may_change, shows_tools
from splitfire.core.model_source import served_name
from splitfire.core.outlets import MetricsOutlets, wants_metrics
from splitfire.core.process import end_soon
from splitfire.core.settings import LOOPBACK, RouterSettings
from splitfire.core.telemetry import Telemetry
from splitfire.core.validation import ModelLimits
from splitfire.v1 import fleet_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.batches.runner import BatchRunner
    from router.http_api import Routes
    from router.http_server import HttpServer
    from router.metrics import RouterMetrics

log = structlog.get_logger("router")
TICK_S = 0.5
SETTLE_S = 0.05
GC_THRESHOLDS = (50_000, 20, 100)  # objects of requests die by themselves; looking for circles takes a tenth of a request otherwise
SHUTDOWN_S = 3.0  # for saying goodbye
KEEPALIVE = (
    ("grpc.keepalive_time_ms", int(limits.KEEPALIVE_TIME_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(limits.KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
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
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", limits.MAX_FLEET_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_FLEET_MESSAGE_BYTES),
    ("grpc.max_metadata_size", limits.MAX_METADATA_BYTES),
)


class RouterServer:
    """`start`, then `run` until drained."""

    def __init__(self, settings: RouterSettings, model: ModelDir) -> None:
        self.settings = settings
        self._doors = Doors(settings)
        self._router_id = secrets.token_hex(4)
        self.telemetry = Telemetry("splitfire-router", settings.trace_file, f"router-{self._router_id}")
        self._text = TextPool(model)
        self._formats = FormatPool(model)
        self._fleet = Fleet(model, self._on_change)
        admission_limits = AdmissionLimits(
            settings.max_requests, settings.max_queued, limits.MAX_QUEUED_BYTES, settings.max_queued_s, settings.ttft_target_s
        )
        random = Random(secrets.randbits(64))
        self._rules = Rules(settings.split, make_policy(settings.placement), settings.local_fallback)
        placing = Placing(self._fleet, self._rules, random)
        self._admission: Admission[Scan, Room] = Admission(admission_limits, time.monotonic, placing.begin_scan, random)
        self._flow = Flow(self._fleet, self._admission, placing, self.telemetry, model.config.vocab_size)
        self._canaries = Canaries(self._fleet, tries_idle=settings.canary)
        self._rebalancer = Rebalancer(self._fleet, self._admission, settings.ttft_target_s) if settings.rebalance else None
        self._base_limits = ModelLimits(
            name=settings.model_name or served_name(settings.model, model.path),
            vocab_size=model.config.vocab_size,
            context_length=settings.max_context or model.config.max_positions,
            eos_token_ids=model.config.eos_token_ids,
            defaults=model.generation,
            has_chat_template=model.chat_template is not None,
            shows_tools=shows_tools(model.chat_template or ""),
        )
        self._limits_now = self._base_limits
        self._worker_ports: list[str] = []
        self._model = model
        self._is_draining = False
        self._is_pump_due = False
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._exit_code = 0
        self._health = HealthServicer()
        options = (*PUBLIC_OPTIONS, ("grpc.so_reuseport", int(settings.share_port)))
        self._public = grpc.aio.server(options=options, interceptors=(Gate(self._doors.access),))
        self._private = grpc.aio.server(options=WORKER_OPTIONS)
        self._http: HttpServer | None = None
        self._usage = make_usage_log(settings.usage_file, settings.prices_file)
        self._batches: BatchRunner | None = None
        self._outlets: MetricsOutlets | None = None
        self.port = self.worker_port = 0

    async def start(self) -> None:
        """ConfigError when the tokenizer cannot be used or a port cannot be had."""
        settings = self.settings
        doors = self._doors
        await self._text.start()
        served = ServedModel(self._limits, Tokenizer.from_file(str(self._model.tokenizer_path)), self._text, self._formats)
        tenants = Tenants(doors.access, Quotas(time.monotonic, lambda: self._fleet.num_routers))
        describe = Describer(self._fleet, self._flow.placing, settings.placement, self._worker_ports)
        recent = Recent(time.monotonic)
        metrics = self._make_metrics()
        listeners = [recent.add]
        listeners += [metrics.of_requests.add] if metrics is not None else []
        listeners += [self._usage.add] if self._usage is not None else []
        self._inference = Inference(served, tenants, self._flow, self.telemetry, listeners)
        api = InferenceApi(self._inference, self._fleet, self._flow, describe, recent)
        self._public.add_generic_rpc_handlers((api.handlers(), AdminApi(self._fleet).handlers()))
        add_HealthServicer_to_server(self._health, self._public)
        is_open = settings.host in LOOPBACK and settings.keys_file is None
        has_reflection = settings.reflection if settings.reflection is not None else is_open
        if has_reflection:
            reflection.enable_server_reflection((SERVICE, ADMIN_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), self._public)
        has_tls, is_api_key = doors.private is not None, doors.access.is_tenants
        service = FleetService(self._fleet, self._router_id, doors.token, has_tls=has_tls, is_api_key=is_api_key)
        fleet_pb2_grpc.add_FleetServicer_to_server(service, self._private)
        self.port = _listen(self._public, "port", settings.host, settings.port, doors.public)
        self.worker_port = _listen(self._private, "worker_port", settings.worker_host, settings.worker_port, doors.private)
        self._worker_ports.append(f"{settings.worker_host}:{self.worker_port}")
        metrics_port, http_port = self._open_metrics(metrics), await self._open_http()
        await self._tell_health()
        await self._private.start()
        await self._public.start()
        if settings.insecure:
            log.warning(
                "insecure: what has no TLS here is in clear text, what has no credentials is anybody's who reaches it",
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
            http_port=http_port,
        )

    async def run(self) -> int:
        """Until drained, or lost to a bug; the exit code."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        ticker = asyncio.create_task(self._tick(), name="router-tick")
        ticker.add_done_callback(self._on_ticker_done)
        await self._stopped.wait()
        end_soon()
        ticker.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.gather(ticker, return_exceptions=True)
                if self._batches is not None:
                    await self._batches.stop()
                if self._http is not None:
                    await self._http.stop()
                await self._public.stop(0.5)
                await self._private.stop(0.5)
                await self._text.close()
                await self._formats.close()
                if self._outlets is not None:
                    await asyncio.to_thread(self._outlets.close)
        self.telemetry.shutdown()
        if self._usage is not None:
            self._usage.close()
        return self._exit_code

    def drain(self) -> None:
        """SIGTERM: refuse new requests, let open ones finish within the grace time. The second time: at once."""
        if self._is_draining:
            self._stopped.set()
            return
        self._is_draining = self._inference.is_draining = True
        if self._batches is not None:
            self._batches.drain()
        log.info("draining", requests=self._inference.num_active, grace_s=self.settings.router_grace_s)
        asyncio.get_running_loop().call_later(self.settings.router_grace_s, self._stopped.set)
        self._changed.set()

    def reload(self) -> None:
        """SIGHUP: keys and certificates are read again; no stream notices."""
        self._doors.reload()

    async def _open_http(self) -> int | None:
        """The port, if there is to be one."""
        settings = self.settings
        if settings.http_port is None:
            return None
        from router.http_api import HttpApi  # noqa: PLC0415 - 90 ms, only if used
        from router.http_server import HttpServer  # noqa: PLC0415

        def fingerprint() -> str:
            return self._fleet.model_digest.hex()[:12]

        files = await self._open_files(fingerprint) if settings.files_dir is not None else None
        api = HttpApi(self._inference, fingerprint, self._can_serve, is_loopback=settings.host in LOOPBACK, files=files)
        self._http = HttpServer(api, settings.tls_cert, settings.tls_key)
        self._doors.also_reload(self._http.reload)
        return await self._http.start(settings.host, settings.http_port, is_shared=settings.share_port)

    def _make_metrics(self) -> RouterMetrics | None:
        """For whoever scrapes, or for a collector; None where there is neither."""
        if not wants_metrics(self.settings.metrics_port):
            return None
        from router.metrics import RouterMetrics, load_of  # noqa: PLC0415 - 60 ms, only if used
        from router.request_metrics import RequestMetrics  # noqa: PLC0415

        fleet, admission = self._fleet, self._admission
        of_requests = RequestMetrics(
            self._base_limits.name,
            lambda: load_of(fleet, admission.num_running, admission.num_queued),
            is_vllm=self.settings.metrics_compat == "vllm",
        )
        return RouterMetrics(fleet, lambda: admission.num_running, lambda: admission.num_queued, of_requests)

    def _open_metrics(self, metrics: RouterMetrics | None) -> int | None:
        """The port, if there is to be one."""
        if metrics is None:
            return None
        from router.request_metrics import OTEL  # noqa: PLC0415 - only if used

        host, port, post = self.settings.metrics_host, self.settings.metrics_port, asyncio.get_running_loop().call_soon_threadsafe
        self._outlets = MetricsOutlets(host, port, self.telemetry, metrics.collect, post, OTEL)
        return self._outlets.port

    async def _open_files(self, fingerprint: Callable[[], str]) -> Routes:
        """Files and batches. ConfigError when their directory cannot be used."""
        from router.batches.api import BatchApi  # noqa: PLC0415 - only if used
        from router.batches.disk import Disk  # noqa: PLC0415
        from router.batches.runner import BatchRunner  # noqa: PLC0415
        from router.batches.store import FileStore  # noqa: PLC0415
        from router.completions import Completions  # noqa: PLC0415

        settings, disk = self.settings, Disk()
        assert settings.files_dir is not None
        store = FileStore(settings.files_dir.absolute(), settings.files_bytes)
        await disk(store.open)
        completions = Completions(self._inference, fingerprint)
        self._batches = BatchRunner(store, disk, completions, self._doors.access, settings.batch_requests)
        self._batches.start()
        return BatchApi(store, disk, self._batches, lambda: self._base_limits.name).routes()

    def _limits(self) -> ModelLimits:
        base, shortest, pool_tokens = self._base_limits, self._fleet.max_context, self._fleet.pool_tokens
        length = min(base.context_length, shortest or base.context_length)
        if (length, pool_tokens) != (self._limits_now.context_length, self._limits_now.pool_tokens):
            self._limits_now = replace(base, context_length=length, pool_tokens=pool_tokens)
        return self._limits_now

    def _on_change(self) -> None:
        """Workers came, went, or have room: whoever waits may start."""
        self._changed.set()
        if not self._is_pump_due:  # what comes in one turn of the loop is looked at once
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        self._admission.pump()

    async def _tick(self) -> None:
        """Keeps health true and queues moving; ends the process when a drain is done."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
                    await asyncio.sleep(SETTLE_S)  # requests change something all the time
            self._changed.clear()
            self._fleet.drop_silent()
            self._canaries.look()
            if self._rebalancer is not None:
                self._rebalancer.look()
            self._admission.rate_tokens_per_s = self._fleet.prompt_tokens_per_s
            self._admission.pump()
            await self._tell_health()
            if self._is_draining and self._inference.num_active == 0:
                self._stopped.set()

    def _on_ticker_done(self, ticker: asyncio.Task[None]) -> None:
        """Without it nothing would notice the silent, nor end a drain."""
        if not ticker.cancelled() and (exc := ticker.exception()) is not None:
            log.error("router stops", error=type(exc).__name__, detail=str(exc), exc_info=exc)
            self._exit_code = 1
            self._stopped.set()

    def _can_serve(self) -> bool:
        """Whether a request could be placed."""
        return not self._is_draining and missing_role(self._fleet.scan().workers, self._rules) is None

    async def _tell_health(self) -> None:
        """SERVING exactly when it can."""
        status = health_pb2.HealthCheckResponse.SERVING if self._can_serve() else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)


def _listen(server: grpc.aio.Server, setting: str, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    address = f"{host}:{port}"
    try:
        return server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError as exc:
        flag = setting.replace("_", "-")
        raise ConfigError(
            f"{setting}: cannot listen on {host}:{port}: in use (`ss -ltnp` shows by whom) or not allowed; choose another with --{flag}"
        ) from exc
