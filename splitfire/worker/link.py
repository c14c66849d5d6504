"""One router, as a worker sees it: dial, say hello, keep two streams, dial again when they break. io thread.

Attach carries work and tokens, Report carries load, so that bulk never delays a token. What could not be sent yet is
merged per attempt, so the backlog of a slow router is bounded by the tokens of the attempts it submitted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc
import structlog

from splitfire.core import limits
from splitfire.core.errors import Mismatch
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc
from splitfire.worker.channels import dial_in_clear_text

log = structlog.get_logger("worker")
AttachCall: TypeAlias = "grpc.aio.StreamStreamCall[fleet_pb2.AttachRequest, fleet_pb2.AttachResponse]"
ReportCall: TypeAlias = "grpc.aio.StreamStreamCall[fleet_pb2.ReportRequest, fleet_pb2.ReportResponse]"
Metadata: TypeAlias = tuple[tuple[str, str], ...]
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 2.0


class Reports(Protocol):
    """Load, measured pairs and the prefix cache, as one router is told of them."""

    def messages(self) -> AsyncIterator[fleet_pb2.ReportRequest]: ...

    def resync(self) -> None:
        """The router lost count of what the prefix cache holds."""


class WorkerSide(Protocol):
    """What a link needs from its worker."""

    def hello(self) -> fleet_pb2.Hello: ...

    def on_frame(self, link: RouterLink, frame: fleet_pb2.AttachResponse) -> None: ...

    def on_attached(self, link: RouterLink) -> None: ...

    def on_lost(self, link: RouterLink) -> None:
        """The stream broke: the attempts of this router are over."""

    def reports(self, link: RouterLink) -> AbstractContextManager[Reports]:
        """What is reported to this router, for as long as the stream is open."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """One router, the credential it wants, and how it is dialled."""

    address: str
    token: bytes | None = None
    dial: Callable[[str], grpc.aio.Channel] = dial_in_clear_text


class RouterLink:
    """Implements `Replies` for the jobs of this router."""

    def __init__(self, options: LinkOptions, worker: WorkerSide, on_refused: Callable[[Mismatch], None]) -> None:
        self.options = options
        self.is_attached = False
        self.router_id = ""  # of the process that is or was attached to
        self._last_failure: str | None = None
        self._worker = worker
        self._on_refused = on_refused
        self._outputs: dict[tuple[int, int], fleet_pb2.SequenceOutput] = {}  # by attempt and choice
        self._ends: list[fleet_pb2.AttachRequest] = []
        self._has_frames = asyncio.Event()
        self._is_flushed = asyncio.Event()
        self._is_flushed.set()
        self._must_end = asyncio.Event()

    # -- Replies

    def output(self, output: fleet_pb2.SequenceOutput) -> None:
        key = (output.attempt, output.choice)
        unsent = self._outputs.get(key)
        if unsent is None:
            self._outputs[key] = output
        else:  # token ids follow one another, so the frames merge; a repeated first token is not repeated twice
            known = unsent.offset + len(unsent.token_ids) - output.offset
            unsent.token_ids.extend(output.token_ids[known:])
            unsent.logprobs.extend(output.logprobs[known:])
            unsent.draft_tokens += output.draft_tokens
            unsent.accepted_offsets.extend(output.accepted_offsets)
            if output.HasField("timing"):
                unsent.timing.MergeFrom(output.timing)
        self._has_frames.set()

    def finished(self, finished: fleet_pb2.Finished) -> None:
        self._ends.append(fleet_pb2.AttachRequest(finished=finished))
        self._has_frames.set()

    def refused(self, refused: fleet_pb2.Refused) -> None:
        self._ends.append(fleet_pb2.AttachRequest(refused=refused))
        self._has_frames.set()

    # -- life

    async def flush(self) -> None:
        """Until everything said so far was handed to the stream, or there is none."""
        if self.is_attached:
            if self._outputs or self._ends:
                self._is_flushed.clear()
            await self._is_flushed.wait()

    def attach_again(self) -> None:
        """Ends the streams; the next hello says what has changed."""
        self._must_end.set()

    async def run(self) -> None:
        """Stays attached until cancelled. Retries with jitter; a mismatch is final."""
        delay = FIRST_RETRY_S
        while True:
            try:
                if await self._attach_once():
                    delay = FIRST_RETRY_S
            except grpc.aio.AioRpcError as exc:
                if exc.code() in (
                    grpc.StatusCode.FAILED_PRECONDITION,
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.PERMISSION_DENIED,
                    grpc.StatusCode.INVALID_ARGUMENT,
                ):
                    self._on_refused(Mismatch(exc.details() or "refused", reason="refused"))
                    return
                say = log.debug if exc.details() == self._last_failure else log.warning  # once for each reason
                self._last_failure = exc.details()
                say("router not reached", router=self.options.address, code=exc.code().name, detail=exc.details())
            except TimeoutError:
                log.warning("router does not answer", router=self.options.address)
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
            delay = min(delay * 2, MAX_RETRY_S)

    async def _attach_once(self) -> bool:
        """Whether the worker was attached; it no longer is."""
        metadata = (("authorization", f"Bearer {self.options.token.decode()}"),) if self.options.token else ()
        async with self.options.dial(self.options.address) as channel:
            stub = fleet_pb2_grpc.FleetStub(channel)
            call = stub.Attach(metadata=metadata)
            try:
                self._must_end.clear()
                await call.write(fleet_pb2.AttachRequest(hello=self._worker.hello()))
                async with asyncio.timeout(limits.HELLO_TIMEOUT_S):
                    frame = await call.read()
                if not isinstance(frame, fleet_pb2.AttachResponse) or not frame.HasField("welcome"):
                    return False  # the router ended the stream; with an error, read has raised it
                self.is_attached, self.router_id = True, frame.welcome.router_id
                self._worker.on_attached(self)
                log.info("attached", router=self.options.address, router_id=frame.welcome.router_id)
                await self._serve(stub, call, metadata)
                return True
            finally:
                call.cancel()
                if self.is_attached:
                    self.is_attached = False
                    self._outputs.clear()
                    self._ends.clear()
                    self._worker.on_lost(self)
                    log.info("detached", router=self.options.address)

    async def _serve(self, stub: fleet_pb2_grpc.FleetAsyncStub, call: AttachCall, metadata: Metadata) -> None:
        """Until the router ends one of the two streams, or one breaks, or the worker attaches again."""
        parts = (("read", self._read(call)), ("write", self._write(call)), ("report", self._report(stub, metadata)))
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(part, name=f"link-{name}-{self.options.address}") for name, part in parts
        ]
        tasks.append(asyncio.create_task(self._must_end.wait(), name=f"link-end-{self.options.address}"))
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._is_flushed.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            exc = task.exception()
            if isinstance(exc, grpc.aio.AioRpcError):
                log.info("stream broke", router=self.options.address, code=exc.code().name, detail=exc.details())
                if exc.code() is grpc.StatusCode.FAILED_PRECONDITION and task is tasks[0]:
                    raise exc  # the router does not want this worker any more
            elif isinstance(exc, asyncio.InvalidStateError):  # what a write to a stream that is over raises
                log.info("stream is over", router=self.options.address)
            elif exc is not None:
                raise exc

    async def _read(self, call: AttachCall) -> None:
        while isinstance(frame := await call.read(), fleet_pb2.AttachResponse):
            self._worker.on_frame(self, frame)

    async def _write(self, call: AttachCall) -> None:
        while True:
            if not (self._outputs or self._ends):
                self._is_flushed.set()
            await self._has_frames.wait()
            self._has_frames.clear()
            self._is_flushed.clear()
            outputs, self._outputs = self._outputs, {}
            ends, self._ends = self._ends, []
            if outputs:
                await call.write(fleet_pb2.AttachRequest(step_output=fleet_pb2.StepOutput(sequences=outputs.values())))
            for end in ends:
                await call.write(end)

    async def _report(self, stub: fleet_pb2_grpc.FleetAsyncStub, metadata: Metadata) -> None:
        call = stub.Report(metadata=metadata)
        with self._worker.reports(self) as reports:
            listening = asyncio.create_task(_listen(call, reports), name=f"link-resync-{self.options.address}")
            try:
                async for report in reports.messages():
                    await call.write(report)
            finally:
                listening.cancel()
                call.cancel()
                await asyncio.gather(listening, return_exceptions=True)


async def _listen(call: ReportCall, reports: Reports) -> None:
    """Until the stream is over, which the next write finds out."""
    while isinstance(answer := await call.read(), fleet_pb2.ReportResponse):
        if answer.resync:
            reports.resync()
