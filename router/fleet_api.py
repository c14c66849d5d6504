"""The service workers dial: authenticates, greets, and carries frames between a stream and the fleet."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog

from router.fleet import Fleet
from router.status import abort
from router.worker_handle import WorkerHandle
from splitfire.core import limits
from splitfire.core.errors import Forbidden, InvalidInput, Mismatch, SplitfireError, Unauthenticated, Unavailable
from splitfire.core.fingerprint import PROTOCOL_MAJOR, PROTOCOL_MINOR
from splitfire.core.identity import FleetRole
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc

log = structlog.get_logger("router")
FleetContext = grpc.aio.ServicerContext[Any, Any]


class FleetService(fleet_pb2_grpc.FleetServicer):
    """fleet.proto's service, for workers only."""

    def __init__(
        self,
        fleet: Fleet,
        router_id: str,
        token: bytes | None,
        *,
        has_tls: bool = False,
        is_api_key: Callable[[str], bool] = lambda _key: False,
    ) -> None:
        self._fleet = fleet
        self._router_id = router_id
        self._token = token
        self._has_tls = has_tls  # every connection has shown a certificate of the fleet
        self._is_api_key = is_api_key

    async def Attach(self, requests: AsyncIterator[fleet_pb2.AttachRequest], context: FleetContext) -> None:  # type: ignore[override]  # noqa: N802
        """One worker, for as long as its stream lives."""
        try:
            self._authenticate(context)
            async with asyncio.timeout(limits.HELLO_TIMEOUT_S):
                first = await context.read()
            if not isinstance(first, fleet_pb2.AttachRequest) or not first.HasField("hello"):
                raise InvalidInput("frame", "the first one must be hello")
            self._fleet.check(first.hello)
        except TimeoutError:
            return
        except SplitfireError as exc:
            log.warning("worker refused", reason=exc.reason, detail=str(exc))
            await abort(context, exc, "")
        worker = WorkerHandle(first.hello)
        version = fleet_pb2.ProtocolVersion(major=PROTOCOL_MAJOR, minor=PROTOCOL_MINOR)
        worker.send(welcome=fleet_pb2.Welcome(router_id=self._router_id, version=version))
        self._fleet.add(worker)
        tasks = [
            asyncio.create_task(self._write(worker, context), name=f"fleet-write-{worker.hello.worker_id}"),
            asyncio.create_task(self._read(worker, context), name=f"fleet-read-{worker.hello.worker_id}"),
            asyncio.create_task(worker.is_gone.wait(), name=f"fleet-gone-{worker.hello.worker_id}"),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._fleet.remove(worker)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if worker.is_replaced:  # if its process lives, it must not come back and fence the other in turn
            taken = f"another worker attached as {worker.hello.worker_id}; give every worker a --worker-id of its own"
            await abort(context, Mismatch(taken, reason="worker_id_taken"), "")

    async def Report(self, requests: AsyncIterator[fleet_pb2.ReportRequest], context: FleetContext) -> None:  # type: ignore[override]  # noqa: N802
        try:
            self._authenticate(context)
            while True:
                async with asyncio.timeout(limits.DEAD_AFTER_S):
                    report = await context.read()
                if not isinstance(report, fleet_pb2.ReportRequest):
                    return
                if not self._fleet.on_report(report):
                    await context.write(fleet_pb2.ReportResponse(resync=True))
        except TimeoutError:
            silence = Unavailable(f"nothing was reported for {limits.DEAD_AFTER_S:g} s; attach again", reason="silent")
            await abort(context, silence, "")
        except SplitfireError as exc:
            await abort(context, exc, "")

    async def _write(self, worker: WorkerHandle, context: FleetContext) -> None:
        while True:
            await context.write(await worker.outbox.get())

    async def _read(self, worker: WorkerHandle, context: FleetContext) -> None:
        """Never waits for a client: every frame goes into a buffer."""
        incarnation = worker.incarnation
        while isinstance(request := await context.read(), fleet_pb2.AttachRequest):
            kind = request.WhichOneof("frame")
            if kind == "step_output":
                for output in request.step_output.sequences:
                    events = worker.events(output.attempt)
                    if events is not None:
                        events.on_output(incarnation, output)
            elif kind == "finished":
                events = worker.events(request.finished.attempt)
                if events is not None:
                    events.on_finished(incarnation, request.finished)
            elif kind == "refused":
                events = worker.events(request.refused.attempt)
                if events is not None:
                    events.on_refused(incarnation, request.refused)

    def _authenticate(self, context: FleetContext) -> None:
        """Every call of this port is a worker's: by its certificate where there is TLS, by the fleet's token where there is one."""
        if self._has_tls and FleetRole.WORKER.encode() not in context.auth_context().get("peer_uri", ()):
            raise Forbidden(
                f"this port is for workers; the certificate does not have the name {FleetRole.WORKER}", reason="fleet_role"
            )
        if self._token is None:
            return
        given = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
        expected = b"Bearer " + self._token
        if len(given) == 1 and hmac.compare_digest(given[0].encode(), expected):
            return
        if len(given) == 1 and self._is_api_key(given[0].removeprefix("Bearer ")):
            raise Forbidden("this port is for workers; API keys open the one for clients", reason="fleet_token")
        raise Unauthenticated("this port is for workers; give them the router's --fleet-token-file", reason="fleet_token")
