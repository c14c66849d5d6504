"""A worker process, joined: links to routers, the engine's host, the transfer agent, and what it has to do. io thread.

A frame of a router goes to whom it is for, a step of the engine to the jobs that it computed. Everything is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.frames import slot_bytes_for
from kvtransfer.transport import Transport
from splitfire.core.errors import Mismatch, SplitfireError
from splitfire.core.fingerprint import PROTOCOL_MAJOR, PROTOCOL_MINOR
from splitfire.core.machine import facts_to_wire
from splitfire.core.outlets import MetricsOutlets, wants_metrics
from splitfire.core.process import end_soon
from splitfire.core.scrape_target import ScrapeTarget
from splitfire.core.secret_files import read_secret
from splitfire.core.settings import WorkerSettings
from splitfire.core.telemetry import Telemetry
from splitfire.core.wire import fingerprint_to_wire, layout_to_wire
from splitfire.engine.parallel.followers import RankLost
from splitfire.engine.updates import StepResult
from splitfire.v1 import fleet_pb2
from splitfire.worker.channels import Dialler
from splitfire.worker.context import GeneratingService, SendingService, WorkerContext
from splitfire.worker.grammars import GrammarDesk
from splitfire.worker.health import HealthFile, HealthPort
from splitfire.worker.host import EngineHost
from splitfire.worker.job import JobLimits, peer_address
from splitfire.worker.jobs import Jobs
from splitfire.worker.link import LinkOptions, RouterLink
from splitfire.worker.load import LoadReporter, ReportStream, host_id
from splitfire.worker.loading import LoadedModel
from splitfire.worker.machine import copy_rate, machine_facts
from splitfire.worker.pairs import PairMeasurer
from splitfire.worker.role_change import RoleChanger
from splitfire.worker.roster import Roster
from splitfire.worker.routers import Routers

log = structlog.get_logger("worker")
WATCH_EVERY_S = 0.5
SHUTDOWN_S = 3.0  # for saying goodbye
STUCK_S = 60.0  # a step that takes longer than this means the engine is lost, not slow


class Worker:
    """One per process. `run` returns the exit code."""

    def __init__(
        self,
        settings: WorkerSettings,
        loaded: LoadedModel,
        transport: Transport,
        services: Callable[[WorkerContext], tuple[SendingService, GeneratingService]],
    ) -> None:
        self.settings = settings
        self.incarnation = secrets.token_bytes(16)
        self.worker_id = settings.worker_id or f"{settings.role}-{self.incarnation.hex()[:6]}"
        self._loaded = loaded
        self._telemetry = Telemetry(f"splitfire-{settings.role}", settings.trace_file, self.worker_id)
        loop = asyncio.get_running_loop()
        self._host = EngineHost(loaded.engine, loop, lambda ids: self._jobs.on_started(ids), self._on_step, self._on_crash)
        widest = replace(loaded.layout, dtype="fp32")  # what any peer's pool may ask for
        slot_bytes = max(settings.slot_size, slot_bytes_for(widest.block_bytes))
        options = AgentOptions(settings.send_slots, settings.receive_slots, slot_bytes, settings.max_peers)
        self.agent = TransferAgent(
            transport,
            self.incarnation,
            loaded.fingerprint.digest,
            options,
            is_short_of_blocks=lambda: loaded.engine.lending.is_short,
        )
        context = WorkerContext(self.worker_id, self._host, self.agent, loaded.layout, self._telemetry, settings.kv_digest)
        self._tally = context.tally
        self._grammars = GrammarDesk(loaded.grammars)
        prefill, decode = services(context)
        job_limits = JobLimits(
            loaded.model.config.vocab_size,
            loaded.max_context,
            loaded.engine.blocks.num_blocks,
            loaded.layout,
            loaded.fingerprint,
            transport.name,
        )
        token = read_secret(settings.fleet_token_file) if settings.fleet_token_file else None
        dial = Dialler(settings).dial
        self._routers = Routers(
            settings.routers, lambda address: RouterLink(LinkOptions(address, token, dial), self, self._on_refused)
        )
        self._role = RoleChanger(settings.role, self, self._routers, (prefill, decode))
        self._jobs = Jobs(
            prefill, decode, self._grammars, self._role, job_limits, 2 * settings.max_running, loaded.engine.num_missing
        )
        self._changing: asyncio.Task[None] | None = None
        self._health = HealthPort(settings.status_host, settings.status_port)
        self._health_file = HealthFile(settings.health_file) if settings.health_file is not None else None
        self._outlets: MetricsOutlets | None = None
        self._scrape_target: ScrapeTarget | None = None
        self._reporter = LoadReporter(
            loaded.engine, self.agent, self._jobs.open, lambda: self._jobs.is_draining or self._role.is_changing
        )
        self._measurer = PairMeasurer(self.agent, copy_rate(slot_bytes), self._reporter.add_pair)
        self._roster = Roster(time.monotonic)
        self._changed = asyncio.Event()
        self._exit = asyncio.Event()
        self._exit_code = 0

    async def run(self) -> int:
        """Until drained, refused or crashed."""
        self.agent.start()
        self._host.start()
        await self._health.start()
        metrics_port = self._open_metrics()
        if self.settings.insecure:
            log.warning(
                "insecure: no TLS, KV in clear text",
                status_host=self.settings.status_host,
                ucx_devices=self.settings.ucx_devices,
                tcp_host=self.settings.tcp_host,
                metrics_host=self.settings.metrics_host,
            )
        log.info(
            "ready",
            worker_id=self.worker_id,
            role=self.settings.role,
            status_port=self._health.port,
            metrics_port=metrics_port,
            blocks=self._loaded.engine.blocks.num_blocks,
        )
        tasks = [asyncio.create_task(self._routers.run(), name="routers"), asyncio.create_task(self._watch(), name="watch")]
        for task in tasks:
            task.add_done_callback(self._on_task_done)
        await self._exit.wait()
        end_soon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_S):
                await self._routers.flush()
        for task in (*tasks, *filter(None, [self._changing])):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._health.stop()
                if self._outlets is not None:
                    await asyncio.to_thread(self._outlets.close)
        self._tell_health_file(is_serving=False)
        if self._scrape_target is not None:
            self._scrape_target.remove()
        self.agent.close()
        self._grammars.close()
        self._host.stop()
        self._telemetry.shutdown()
        return self._exit_code

    def _open_metrics(self) -> int | None:
        """The port, if there is to be one."""
        settings = self.settings
        if not wants_metrics(settings.metrics_port):
            return None
        from splitfire.worker.metrics import WorkerMetrics  # noqa: PLC0415 - 60 ms, only if used

        metrics = WorkerMetrics(self.agent, self._loaded.engine, self._reporter, self._tally)
        post = asyncio.get_running_loop().call_soon_threadsafe
        self._outlets = MetricsOutlets(settings.metrics_host, settings.metrics_port, self._telemetry, metrics.collect, post, {})
        port = self._outlets.port
        if settings.metrics_targets is not None and port is not None:
            self._scrape_target = ScrapeTarget(settings.metrics_targets, settings.metrics_host, port, {"worker": self.worker_id})
        return port

    def _tell_health_file(self, *, is_serving: bool) -> None:
        if self._health_file is not None:
            self._health_file.set_serving(is_serving)

    def drain(self) -> None:
        """SIGTERM: no new work, finish what is here within the grace time. The second time: at once."""
        if self._jobs.is_draining:
            self._stop(0)
            return
        self._jobs.is_draining = True
        self._changed.set()
        grace_s = self.settings.grace_of(self._role.role)
        log.info("draining", jobs=self._jobs.num_jobs, grace_s=grace_s)
        asyncio.get_running_loop().call_later(grace_s, self._stop, 0)
        self._reporter.report_now()

    # -- WorkerSide

    def hello(self) -> fleet_pb2.Hello:
        loaded, transport = self._loaded, self.agent.transport
        return fleet_pb2.Hello(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self._role.wire_role,
            version=fleet_pb2.ProtocolVersion(major=PROTOCOL_MAJOR, minor=PROTOCOL_MINOR),
            fingerprint=fingerprint_to_wire(loaded.fingerprint),
            kv_format=layout_to_wire(loaded.layout),
            transports=[fleet_pb2.TransportAddress(name=transport.name, version=transport.version, address=transport.address)],
            capacity=fleet_pb2.Capacity(
                total_blocks=loaded.engine.blocks.num_blocks,
                max_running=self.settings.max_running,
                max_context=loaded.max_context,
                chunk_tokens=loaded.chunk_tokens,
            ),
            host=host_id(),
            machine=facts_to_wire(machine_facts(transport)),
            sends_cache_events=True,
            has_no_prefix_cache=not self.settings.prefix_cache,
        )

    def on_frame(self, link: RouterLink, frame: fleet_pb2.AttachResponse) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "submit":
            self._jobs.submit(link, frame.submit)
        elif kind == "cancel":
            self._jobs.cancel(link, frame.cancel)
        elif kind == "redirect":
            self._jobs.redirect(link, frame.redirect)
        elif kind == "peer_up":
            self._roster.up(link, frame.peer_up.peer.incarnation)
            self._meet(frame.peer_up.peer)
        elif kind == "peer_gone":
            if self._roster.gone(link, frame.peer_gone.incarnation):
                self._part(frame.peer_gone.incarnation)
        elif kind == "measure":
            self._measurer.measure(frame.measure.peer_incarnation)
        elif kind == "drain" and not self._jobs.is_draining:
            self.drain()
        elif kind == "change_role":
            self._change_role(frame.change_role)

    def on_attached(self, link: RouterLink) -> None:
        self._routers.attached(link)
        self._changed.set()

    def on_lost(self, link: RouterLink) -> None:
        self._changed.set()
        self._roster.router_lost(link)
        self._jobs.router_lost(link)

    def reports(self, link: RouterLink) -> contextlib.AbstractContextManager[ReportStream]:
        return self._reporter.stream(link)

    # -- WorkerInside

    @property
    def num_busy(self) -> int:
        return self._jobs.num_jobs + self.agent.num_open

    def report_now(self) -> None:
        self._reporter.report_now()

    # -- inside

    def _on_step(self, result: StepResult) -> None:
        self._reporter.cache_may_have_changed()
        self._jobs.on_step(result)
        if any(update.is_finished for update in result.events):
            self._reporter.report_now()

    def _meet(self, peer: fleet_pb2.Peer) -> None:
        """A worker of the other role is up. The prefill side measures."""
        try:
            address = peer_address(peer, self.agent.transport.name)
            self.agent.meet(address)
        except SplitfireError as exc:
            log.warning("cannot exchange KV", peer=peer.worker_id, reason=str(exc))
            return
        if self._role.role == "prefill":
            self._measurer.meet(address, is_same_host=peer.host == host_id())
            self._reporter.repeat_pair(address.incarnation)

    def _change_role(self, change: fleet_pb2.ChangeRole) -> None:
        if not self._jobs.is_draining and self._role.begin(change.role, change.grace_s):
            self._changing = asyncio.create_task(self._role.run(change.grace_s), name="role-change")
            self._changing.add_done_callback(self._on_task_done)

    def _part(self, incarnation: bytes) -> None:
        self._measurer.part(incarnation)
        self._reporter.forget(incarnation)
        self.agent.peer_gone(incarnation)

    async def _watch(self) -> None:
        """Keeps health true, ends a drain when nothing is left, and the process when its engine is lost."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_EVERY_S):
                    await self._changed.wait()
            self._changed.clear()
            is_serving = not self._jobs.is_draining and self._routers.is_attached
            await self._health.set_serving(is_serving)
            self._tell_health_file(is_serving=is_serving)
            if self.agent.is_worn_out and not self._jobs.is_draining:
                log.error("too many transfers were lost with their peers; a fresh start is needed")
                self.drain()
            if self._jobs.is_draining and not self._jobs.num_jobs:
                self._stop(0)
            for incarnation in self._roster.expired():
                self._part(incarnation)
            if self._loaded.engine.has_work and time.monotonic() - self._host.last_turn > STUCK_S:
                self._on_crash(TimeoutError(f"no engine step finished within {STUCK_S:g} s"))
            if self._loaded.followers is not None and (lost := self._loaded.followers.lost()):
                self._on_crash(RankLost(lost))

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """Links and the watch only end when this worker does."""
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._on_crash(exc)

    def _on_crash(self, exc: BaseException) -> None:
        log.error("worker stops", error=type(exc).__name__, detail=str(exc))
        self._stop(1)

    def _on_refused(self, error: Mismatch) -> None:
        log.error("router refused this worker", reason=str(error))
        self._stop(2)

    def _stop(self, code: int) -> None:
        self._exit_code = self._exit_code or code
        self._exit.set()
