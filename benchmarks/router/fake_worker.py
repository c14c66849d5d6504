"""One fake worker at one router: the real Fleet protocol, and an engine's clock in place of an engine. Event loop only.

A prefill worker answers with the first token and hands over within this process; a worker that generates steps all its sequences
together and sends one frame a step. Nothing is computed and nothing is moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc

from benchmarks.router.engine import PrefixCache, Speed
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc
from splitfire.v1 import inference_pb2 as pb

AttachCall = grpc.aio.StreamStreamCall[fleet_pb2.AttachRequest, fleet_pb2.AttachResponse]
TOTAL_BLOCKS = 1 << 16
AT_ONCE_S = 0.0  # "at once": nothing that the router could learn from
REPORT_EVERY_S = 0.5
FIRST_ORDINARY_ID = 300  # ids that have text
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 << 20))
PREFILL_PHASES = ("prefill-queue", "prefill", "ship")
DECODE_PHASES = ("grant", "join", "decode")


@dataclass(frozen=True, slots=True)
class FleetShape:
    """So many fake workers of each role, as fast as that. Without prefill workers each computes its prompts itself."""

    prefill: int
    decode: int
    speed: Speed
    block_size: int = 32


@dataclass(eq=False, slots=True)
class Generating:
    """One that generates: which token is next, where it ends."""

    attempt: int
    choice: int
    begins_at: int
    next_offset: int
    max_tokens: int


@dataclass(slots=True)
class Told:
    """What routers told these workers, and what they answered, so far."""

    submitted: int = 0
    cancelled: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Shipping:
    """Hand-offs between workers of this process: the later of the two ends starts the sequence."""

    def __init__(self) -> None:
        self._ready: dict[bytes, Callable[[], None] | None] = {}

    def __len__(self) -> int:
        return len(self._ready)

    def expect(self, transfer_id: bytes, start: Callable[[], None]) -> None:
        if transfer_id in self._ready:
            del self._ready[transfer_id]
            start()
        else:
            self._ready[transfer_id] = start

    def ship(self, transfer_id: bytes) -> None:
        start = self._ready.pop(transfer_id, None)
        if start is not None:
            start()
        else:
            self._ready[transfer_id] = None

    def forget(self, transfer_id: bytes) -> None:
        self._ready.pop(transfer_id, None)


@dataclass(eq=False)
class FakeWorker:
    """One worker at one router."""

    name: str
    is_prefill: bool
    shape: FleetShape
    hello: fleet_pb2.Hello
    shipping: Shipping
    told: Told
    open: dict[int, fleet_pb2.Submit] = field(default_factory=dict)
    running: dict[int, list[Generating]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cache = PrefixCache(self.shape.speed.cached_blocks)
        self._prompts: deque[fleet_pb2.Submit] = deque()
        self._has_prompts, self._has_running, self._has_frames = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._is_written = asyncio.Event()
        self._outputs: list[fleet_pb2.SequenceOutput] = []
        self._ends: list[fleet_pb2.AttachRequest] = []
        self._reports: asyncio.Queue[fleet_pb2.CacheEvents | None] = asyncio.Queue(10_000)
        self._queued_tokens = 0
        self._computed_tokens, self._busy_s = 0, 0.0

    async def run(self, address: str, attached: asyncio.Event) -> None:
        """Until cancelled, or until the router ends a stream."""
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            stub = fleet_pb2_grpc.FleetStub(channel)
            call = stub.Attach()
            await call.write(fleet_pb2.AttachRequest(hello=self.hello))
            await call.read()
            attached.set()
            parts = (self._read(call), self._write(call), self._compute(), self._step(), self._report(stub))
            tasks = [asyncio.create_task(part, name=f"{self.name}-{i}") for i, part in enumerate(parts)]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                call.cancel()

    # -- what comes

    async def _read(self, call: AttachCall) -> None:
        while isinstance(frame := await call.read(), fleet_pb2.AttachResponse):
            if frame.HasField("submit"):
                self._submit(frame.submit)
            elif frame.HasField("cancel"):
                self._cancel(frame.cancel)

    def _submit(self, submit: fleet_pb2.Submit) -> None:
        self.told.submitted += 1
        self.open[submit.attempt] = submit
        if submit.part == fleet_pb2.PART_DECODE:
            self.shipping.expect(submit.handoff.transfer_id, partial(self._start, submit))
            return
        self._queued_tokens += len(submit.prompt_token_ids)
        if self.shape.speed.prefill_s(1) == 0.0:
            self._computed(submit, 0, AT_ONCE_S)
        else:
            self._prompts.append(submit)
            self._has_prompts.set()

    def _cancel(self, cancel: fleet_pb2.Cancel) -> None:
        if (submit := self.open.pop(cancel.attempt, None)) is None:
            return
        self.told.cancelled += 1
        self.running.pop(cancel.attempt, None)
        if submit.handoff.transfer_id:
            self.shipping.forget(submit.handoff.transfer_id)

    # -- the engine

    async def _compute(self) -> None:
        """Prompts one after another, each from the instant the one before ended."""
        free_at = 0.0
        while True:
            await self._has_prompts.wait()
            while self._prompts:
                submit = self._prompts.popleft()
                if submit.attempt not in self.open:  # cancelled while it waited
                    self._queued_tokens -= len(submit.prompt_token_ids)
                    continue
                names = _names(submit)
                most = (len(submit.prompt_token_ids) - 1) // self.shape.block_size  # the last token is always computed
                num_cached = min(self._cache.depth(names), most) * self.shape.block_size
                seconds = self.shape.speed.prefill_s(len(submit.prompt_token_ids) - num_cached)
                free_at = max(free_at, time.monotonic()) + seconds
                await asyncio.sleep(free_at - time.monotonic())
                if self.shape.speed.cached_blocks:
                    change = self._cache.add(names)
                    self._reports.put_nowait(fleet_pb2.CacheEvents(stored=change.stored, removed=change.removed))
                self._computed(submit, num_cached, seconds)
            self._has_prompts.clear()

    def _computed(self, submit: fleet_pb2.Submit, num_cached: int, seconds: float) -> None:
        """The first token, and with it the prompt's KV where it is wanted."""
        self._queued_tokens -= len(submit.prompt_token_ids)
        if submit.attempt not in self.open:
            return
        self.told.prompt_tokens += len(submit.prompt_token_ids)
        self.told.cached_tokens += num_cached
        self._computed_tokens += len(submit.prompt_token_ids) - num_cached
        self._busy_s += seconds
        timing = _timing(PREFILL_PHASES, self.name, seconds)
        timing.cached_tokens = num_cached
        offset = len(submit.output_token_ids)
        for choice in (submit.choice, *submit.more_choices):
            self._output(submit.attempt, choice, offset, 1, timing)
        if submit.part == fleet_pb2.PART_WHOLE:
            self._start(submit)
            return
        del self.open[submit.attempt]
        is_all = submit.stopping.max_tokens - offset == 1
        if not is_all:
            self.shipping.ship(submit.handoff.transfer_id)
        for choice in (submit.choice, *submit.more_choices) if is_all else (0,):
            reason = pb.FINISH_REASON_LENGTH if is_all else pb.FINISH_REASON_UNSPECIFIED
            end = fleet_pb2.Finished(attempt=submit.attempt, choice=choice, reason=reason, transfer_id=submit.handoff.transfer_id)
            self._end(end)

    def _start(self, submit: fleet_pb2.Submit) -> None:
        """Its first frame repeats the first token, as a worker's does: it may come before the prefill worker's."""
        first = len(submit.output_token_ids)
        choices = (submit.choice, *submit.more_choices)
        self.running[submit.attempt] = [
            Generating(submit.attempt, choice, first, first, submit.stopping.max_tokens) for choice in choices
        ]
        self._has_running.set()

    async def _step(self) -> None:
        """All sequences together; without a step time, whenever the router has taken what was sent before."""
        next_at = 0.0
        while True:
            await self._has_running.wait()
            next_at = max(next_at + self.shape.speed.step_s, time.monotonic())
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            if self.shape.speed.step_s == 0.0:
                await self._is_written.wait()
            for sequences in list(self.running.values()):
                for sequence in list(sequences):
                    self._advance(sequence, sequences)
            if not self.running:
                self._has_running.clear()

    def _advance(self, sequence: Generating, sequences: list[Generating]) -> None:
        is_first = sequence.next_offset == sequence.begins_at
        count = min(self.shape.speed.tokens_per_step + is_first, sequence.max_tokens - sequence.next_offset)
        if count > 0:
            self._output(sequence.attempt, sequence.choice, sequence.next_offset, count)
            sequence.next_offset += count
        if sequence.next_offset >= sequence.max_tokens:
            sequences.remove(sequence)
            timing = _timing(DECODE_PHASES, self.name, AT_ONCE_S)
            reason = pb.FINISH_REASON_LENGTH
            self._end(fleet_pb2.Finished(attempt=sequence.attempt, choice=sequence.choice, reason=reason, timing=timing))
            if not sequences:
                self.running.pop(sequence.attempt, None)
                self.open.pop(sequence.attempt, None)

    # -- what goes

    def _output(self, attempt: int, choice: int, offset: int, count: int, timing: fleet_pb2.WorkerTiming | None = None) -> None:
        ids = [FIRST_ORDINARY_ID + (attempt + 7 * i) % 3000 for i in range(offset, offset + count)]
        self.told.tokens += count
        output = fleet_pb2.SequenceOutput(attempt=attempt, choice=choice, offset=offset, token_ids=ids, timing=timing)
        self._outputs.append(output)
        self._has_frames.set()

    def _end(self, finished: fleet_pb2.Finished) -> None:
        self._ends.append(fleet_pb2.AttachRequest(finished=finished))
        self._has_frames.set()

    async def _write(self, call: AttachCall) -> None:
        while True:
            if not (self._outputs or self._ends):
                self._is_written.set()
            await self._has_frames.wait()
            self._has_frames.clear()
            self._is_written.clear()
            outputs, self._outputs = self._outputs, []
            ends, self._ends = self._ends, []
            if outputs:
                await call.write(fleet_pb2.AttachRequest(step_output=fleet_pb2.StepOutput(sequences=outputs)))
            for end in ends:
                await call.write(end)

    async def _report(self, stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        """Load at intervals, and what the cache got and lost at once."""
        call = stub.Report()
        sequence = 0
        while True:
            rate = self._computed_tokens / self._busy_s if self._busy_s else 0.0
            load = fleet_pb2.Load(
                total_blocks=TOTAL_BLOCKS, free_blocks=TOTAL_BLOCKS, running_sequences=len(self.running), num_routers=1,
                queued_tokens=self._queued_tokens, prefill_tokens_per_s=rate, decode_tokens_per_s=1e4,
                step_s=self.shape.speed.step_s, cached_blocks=len(self._cache),
            )  # fmt: skip
            await call.write(fleet_pb2.ReportRequest(incarnation=self.hello.incarnation, load=load))
            next_at = time.monotonic() + REPORT_EVERY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + next_at - time.monotonic()):
                    while events := await self._reports.get():
                        events.sequence = sequence
                        sequence += 1
                        await call.write(fleet_pb2.ReportRequest(incarnation=self.hello.incarnation, cache_events=events))


def _names(submit: fleet_pb2.Submit) -> tuple[int, ...]:
    return tuple(int.from_bytes(name[:8], "little") for name in submit.block_hashes)


def _timing(phases: Sequence[str], worker: str, seconds: float) -> fleet_pb2.WorkerTiming:
    return fleet_pb2.WorkerTiming(phases=[pb.Phase(name=name, duration_s=seconds, worker=worker) for name in phases])
