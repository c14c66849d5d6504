"""One run: requests go out when they are due, whether or not others were answered, and what comes is timed. On one event loop.

Life of a request here: 1. it waits for its instant; 2. it goes out on the connection with the fewest requests, a new one where all are
full; 3. each message of its stream is timed as it is read; 4. its summary, or its error's reason, makes an Outcome of it. Ctrl-C ends the
run early: what was answered by then counts, what was not is only counted.
"""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from splitfire.cli.bench.arrivals import Planned, Window
from splitfire.cli.bench.statistics import Client, Outcome, PhaseTime, gaps_of
from splitfire.cli.client import OPTIONS, reasons_of
from splitfire.v1 import inference_pb2 as pb

STREAMS = 64  # of a connection before another one is opened; a router allows 256, and may be one of several behind the port
MAX_CONNECTIONS = 256
CONNECT_S = 10.0
TICK_S = 0.01  # how often the loop's own lag is looked at
WATCH_S = 0.5
GENERATE = "/splitfire.v1.Inference/Generate"
INCOMPLETE, TOO_MANY = "incomplete_stream", "client_too_many_streams"
LEG_FIRST_TOKEN = getattr(pb, "LEG_FIRST_TOKEN", 1)  # of routers that say of which part of an answer's time a phase is


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask, and as who."""

    address: str
    api_key: bytes | None = None
    authority: bytes | None = None  # PEM; None: in clear text


@dataclass(frozen=True, slots=True)
class Result:
    """Of the measured time, which may have been cut. No outcome when it had not begun."""

    begin_s: float
    duration_s: float
    outcomes: Sequence[Outcome]
    client: Client
    num_unfinished: int
    is_cut: bool


class Connection:
    """One channel and how many streams it has now."""

    def __init__(self, target: Target) -> None:
        options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))  # or all channels of one address would share a connection
        if target.authority is None:
            self.channel = grpc.aio.insecure_channel(target.address, options=options)
        else:
            self.channel = grpc.aio.secure_channel(target.address, grpc.ssl_channel_credentials(target.authority), options=options)
        # Requests were made before the run: as bytes they go out.
        self.generate: grpc.aio.UnaryStreamMultiCallable[bytes, pb.GenerateResponse] = self.channel.unary_stream(
            GENERATE, None, pb.GenerateResponse.FromString
        )
        self.num_streams = 0


class Run:
    """Owned by one event loop. `watch` is called now and then, as who started the fleet wants to look after it."""

    def __init__(
        self, target: Target, requests: Sequence[tuple[Planned, bytes]], window: Window, timeout_s: float,
        watch: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._target = target
        self._requests = requests
        self._window = window
        self._timeout_s = timeout_s
        self._watch = watch
        self._metadata = (("authorization", f"Bearer {target.api_key.decode()}"),) if target.api_key is not None else ()
        self._connections: list[Connection] = []
        self._began = 0.0
        self._lags: list[float] = []

    async def __call__(self) -> Result:
        stopped = asyncio.get_running_loop().create_future()
        try:
            await self._connect()
            with _interrupts(stopped), _short_collections():
                return await self._measure(stopped)
        finally:
            for connection in self._connections:
                await connection.channel.close()

    async def _measure(self, stopped: asyncio.Future[None]) -> Result:
        self._began = time.perf_counter()
        beside = [asyncio.create_task(self._tick(), name="tick"), asyncio.create_task(self._look(), name="watch")]
        tasks: list[tuple[Planned, asyncio.Task[Outcome]]] = []
        cpu_began, cpu_s = time.process_time(), 0.0
        try:
            for planned, message in self._requests:
                if not await self._is_due(planned, stopped):
                    break
                tasks.append((planned, asyncio.create_task(self._ask(planned, message), name="request")))
            await self._until(self._window.end_s, stopped)
            sent_s = time.perf_counter() - self._began
            cpu_s = (time.process_time() - cpu_began) / sent_s
            answered = asyncio.gather(*(task for _, task in tasks), return_exceptions=True)
            await asyncio.wait((answered, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*beside, *(task for _, task in tasks)):
                task.cancel()
            ends = await asyncio.gather(*beside, *(task for _, task in tasks), return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):  # a bug of ours, or a fleet that whoever watches it gave up
                raise end
        measured = [task for planned, task in tasks if planned.is_measured]
        finished = [task.result() for task in measured if not task.cancelled()]
        duration_s = max(0.0, min(sent_s, self._window.end_s) - self._window.warmup_s)
        is_cut = stopped.done()
        return Result(self._window.warmup_s, duration_s, finished, Client(self._lags, cpu_s), len(measured) - len(finished), is_cut)

    async def _ask(self, planned: Planned, message: bytes) -> Outcome:
        due = self._began + planned.at_s
        late_s = time.perf_counter() - due
        connection = self._connection()
        if connection is None:
            return Outcome(planned.at_s, late_s, planned.num_prompt, error=TOO_MANY)
        messages: list[tuple[float, int]] = []
        summary: pb.Summary | None = None
        error = ""
        connection.num_streams += 1
        call = connection.generate(message, timeout=self._timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                if response.token_ids:
                    messages.append((time.perf_counter() - due, len(response.token_ids)))
                if response.HasField("summary"):
                    summary = response.summary
        except grpc.aio.AioRpcError as exc:
            error = (reasons_of(exc) or [exc.code().name.lower()])[0]
        finally:
            call.cancel()
            connection.num_streams -= 1
        if not error and (summary is None or not messages):
            error = INCOMPLETE
        return Outcome(
            due_s=planned.at_s,
            late_s=late_s,
            num_prompt=planned.num_prompt,
            num_cached=summary.usage.cached_prompt_tokens if summary is not None else 0,
            num_tokens=sum(count for _, count in messages),
            ttft_s=messages[0][0] if messages else math.nan,
            gaps_s=gaps_of(messages),
            error=error,
            phases=phases_to_first_token(summary) if summary is not None else (),
        )

    def _connection(self) -> Connection | None:
        best = min(self._connections, key=lambda connection: connection.num_streams)
        if best.num_streams >= STREAMS:
            if len(self._connections) >= MAX_CONNECTIONS:
                return None
            best = Connection(self._target)
            self._connections.append(best)
        return best

    async def _connect(self) -> None:
        """The first connection, before anything is timed. Nobody there: the requests will say so, one by one."""
        self._connections.append(Connection(self._target))
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._connections[0].channel.channel_ready()
        except TimeoutError:
            return

    async def _is_due(self, planned: Planned, stopped: asyncio.Future[None]) -> bool:
        await self._until(planned.at_s, stopped)
        return not stopped.done()

    async def _until(self, at_s: float, stopped: asyncio.Future[None]) -> None:
        left_s = self._began + at_s - time.perf_counter()
        if left_s > 0 and not stopped.done():
            await asyncio.wait({stopped}, timeout=left_s)

    async def _tick(self) -> None:
        """What comes late here is noted late there: a message that waited for the loop looks as if it had come that much later."""
        due = self._began
        while True:
            due = max(due + TICK_S, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            if time.perf_counter() - self._began >= self._window.warmup_s:
                self._lags.append(time.perf_counter() - due)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self._watch()


def phases_to_first_token(summary: pb.Summary) -> tuple[PhaseTime, ...]:
    """Those that add up to it; none where the router's phases do not say to what they belong, and overlap."""
    return tuple(PhaseTime(p.name, p.duration_s) for p in summary.phases if getattr(p, "leg", None) == LEG_FIRST_TOKEN)


@contextmanager
def _interrupts(stopped: asyncio.Future[None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM end the run and nothing else; afterwards they do what they did before."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def stop() -> None:
        if not stopped.done():
            stopped.set_result(None)

    try:
        for number in numbers:
            loop.add_signal_handler(number, stop)
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            loop.remove_signal_handler(number)
            signal.signal(number, old)


@contextmanager
def _short_collections() -> Iterator[None]:
    """The garbage collector would look through every request that waits its turn, and stop the loop for tens of milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
