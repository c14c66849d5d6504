"""The fleet as this router knows it: attached workers, their load, their attempts. Event loop only.

A worker is its incarnation: a restart is another worker. When its Attach stream breaks, its attempts are lost and its
peers are told. Two workers are only ever paired if their model fingerprints are equal, which is checked at Hello.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from router.hello import check_hello, clamp
from router.pairs import Pair, Pairs, is_possible
from router.placement import Placement, WorkerView
from splitfire.core import limits
from splitfire.core.errors import Mismatch, Unavailable
from splitfire.core.fingerprint import PROTOCOL_MAJOR, PROTOCOL_MINOR, Fingerprint
from splitfire.core.model_dir import ModelDir
from splitfire.core.wire import fingerprint_from_wire
from splitfire.v1 import fleet_pb2, inference_pb2

log = structlog.get_logger("router")


class AttemptEvents(Protocol):
    """Who an attempt's frames go to."""

    @property
    def num_choices(self) -> int:
        """That have not ended in it."""

    def on_output(self, incarnation: bytes, output: fleet_pb2.SequenceOutput) -> None: ...

    def on_finished(self, incarnation: bytes, finished: fleet_pb2.Finished) -> None: ...

    def on_refused(self, incarnation: bytes, refused: fleet_pb2.Refused) -> None: ...

    def on_lost(self, incarnation: bytes) -> None:
        """The worker is gone."""


@dataclass(eq=False)
class WorkerHandle:
    """One attached worker. `outbox` is bounded: a worker that does not read its stream is dropped."""

    hello: fleet_pb2.Hello
    outbox: asyncio.Queue[fleet_pb2.AttachResponse] = field(default_factory=lambda: asyncio.Queue(limits.MAX_FRAMES_QUEUED))
    attempts: dict[int, AttemptEvents] = field(default_factory=dict)
    waiting_tokens: dict[int, int] = field(default_factory=dict)  # of attempts whose first token has not come
    load: fleet_pb2.Load = field(default_factory=fleet_pb2.Load)
    reported_at: float = field(default_factory=time.monotonic)
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_replaced: bool = False  # by another process under its name
    num_dropped: int = 0  # frames of attempts that are not here: unknown, finished, another router's
    strikes: int = 0  # reports that cannot be true, protocol errors
    suspect_until: float = 0.0

    @property
    def incarnation(self) -> bytes:
        return self.hello.incarnation

    @property
    def is_prefill(self) -> bool:
        return self.hello.role == inference_pb2.ROLE_PREFILL

    def send(self, **frame: object) -> None:
        try:
            self.outbox.put_nowait(fleet_pb2.AttachResponse(**frame))  # type: ignore[arg-type]
        except asyncio.QueueFull:
            log.error("worker does not read its stream", worker_id=self.hello.worker_id)
            self.is_gone.set()

    def events(self, attempt: int) -> AttemptEvents | None:
        """Who a frame of `attempt` goes to; None, and counted, when it is not open here."""
        events = self.attempts.get(attempt)
        self.num_dropped += events is None
        return events

    def peer(self) -> fleet_pb2.Peer:
        hello = self.hello
        return fleet_pb2.Peer(
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            transports=hello.transports,
            kv_format=hello.kv_format,
            host=hello.host,
        )

    def view(self, now: float) -> WorkerView:
        capacity = self.hello.capacity
        is_silent = now - self.reported_at > limits.SUSPECT_AFTER_S
        return WorkerView(
            incarnation=self.incarnation,
            is_prefill=self.is_prefill,
            can_take=not (self.load.is_draining or self.is_gone.is_set() or is_silent),
            num_running=len(self.attempts) if self.is_prefill else sum(events.num_choices for events in self.attempts.values()),
            queued_tokens=sum(self.waiting_tokens.values()),
            max_running=capacity.max_running,
            chunk_tokens=capacity.chunk_tokens,
            block_size=self.hello.kv_format.block_size,
            free_blocks=self.load.free_blocks,
            is_suspect=now < self.suspect_until,
        )


class Fleet:
    """All attached workers. Event loop only."""

    def __init__(self, model: ModelDir, on_change: Callable[[], None]) -> None:
        self._model = model
        self._on_change = on_change
        self._workers: dict[bytes, WorkerHandle] = {}
        self.pairs = Pairs()
        self._bad_pairs: dict[Pair, float] = {}  # until when
        self._next_attempt = 1

    @property
    def workers(self) -> list[WorkerHandle]:
        return list(self._workers.values())

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the workers; None while there is none."""
        first = next(iter(self._workers.values()), None)
        return fingerprint_from_wire(first.hello.fingerprint) if first is not None else None

    @property
    def max_context(self) -> int | None:
        """The shortest of the workers'; None while there is none."""
        return min((w.hello.capacity.max_context for w in self._workers.values()), default=None)

    @property
    def pool_tokens(self) -> int | None:
        """KV room of the largest decode pool."""
        pools = [w.hello.capacity.total_blocks * w.hello.kv_format.block_size for w in self._workers.values() if not w.is_prefill]
        return max(pools, default=None)

    def snapshot(self) -> list[WorkerView]:
        now = time.monotonic()
        rates = self.pairs.rates()
        views = [replace(w.view(now), peer_bytes_per_s=rates.get(w.incarnation, {})) for w in self._workers.values()]
        if self._bad_pairs:
            self._bad_pairs = {pair: until for pair, until in self._bad_pairs.items() if now < until}
            bad = {p.prefill: frozenset(o.decode for o in self._bad_pairs if o.prefill == p.prefill) for p in self._bad_pairs}
            views = [replace(view, bad_peers=bad.get(view.incarnation, frozenset())) for view in views]
        return views

    def begin(self, placement: Placement, num_tokens: int, events: AttemptEvents) -> int:
        """Counts an attempt at its workers from now on, before anything is sent; its number."""
        attempt = self._next_attempt
        self._next_attempt += 1
        for incarnation in filter(None, (placement.prefill, placement.decode)):
            self._workers[incarnation].attempts[attempt] = events
        computing = placement.prefill or placement.decode
        assert computing is not None
        self._workers[computing].waiting_tokens[attempt] = num_tokens
        return attempt

    def move(self, attempt: int, source: bytes | None, target: bytes, events: AttemptEvents) -> None:
        """Another decode worker takes the attempt; the one before, if it is still there, lets go of it."""
        if source is not None:
            self.end(attempt, source, "redirected")
        self._workers[target].attempts[attempt] = events

    def has(self, attempt: int, incarnation: bytes | None) -> bool:
        """Whether the attempt is open at a worker that is attached."""
        worker = self._workers.get(incarnation) if incarnation is not None else None
        return worker is not None and attempt in worker.attempts

    def avoid_pair(self, prefill: bytes, decode: bytes) -> None:
        """A transfer between these two broke though both live (F31): for a while they are paired only if there is nobody else."""
        self._bad_pairs[Pair(prefill, decode)] = time.monotonic() + limits.BAD_PAIR_S
        while len(self._bad_pairs) > limits.MAX_WORKERS:
            del self._bad_pairs[next(iter(self._bad_pairs))]

    def started(self, attempt: int) -> None:
        """The first token came: its prompt waits for nobody any more."""
        for worker in self._workers.values():
            if worker.waiting_tokens.pop(attempt, None) is not None:
                self._on_change()

    def end(self, attempt: int, incarnation: bytes | None, cancel_reason: str | None) -> None:
        """The attempt is over at one worker or (None) at all; told to the worker when a reason is given."""
        for worker in self._workers.values():
            if incarnation in (None, worker.incarnation) and worker.attempts.pop(attempt, None) is not None:
                worker.waiting_tokens.pop(attempt, None)
                if cancel_reason is not None:
                    worker.send(cancel=fleet_pb2.Cancel(attempt=attempt, reason=cancel_reason))
        self._on_change()

    def cancel_choice(self, attempt: int, choice: int, reason: str, *, but_at: bytes | None = None) -> None:
        """One of an attempt's choices is over; told to every worker (or all but one) that has the others."""
        for worker in self._workers.values():
            if attempt in worker.attempts and worker.incarnation != but_at:
                worker.send(cancel=fleet_pb2.Cancel(attempt=attempt, choice=choice, reason=reason))
        self._on_change()

    def worker(self, incarnation: bytes) -> WorkerHandle | None:
        return self._workers.get(incarnation)

    def add(self, worker: WorkerHandle) -> None:
        """Introduces a worker that passed `check` to those of the other role. It takes the place of one with its name or
        incarnation: that one's stream is broken and nobody has noticed yet."""
        hello = worker.hello
        for old in [
            w for w in self._workers.values() if w.hello.worker_id == hello.worker_id or w.incarnation == hello.incarnation
        ]:
            log.warning("worker attached again", worker_id=hello.worker_id, is_restart=old.incarnation != hello.incarnation)
            old.is_replaced = old.incarnation != hello.incarnation
            old.is_gone.set()
            self.remove(old)
        worker.load.total_blocks = worker.load.free_blocks = hello.capacity.total_blocks
        for other in self._workers.values():
            if other.is_prefill is not worker.is_prefill:
                other.send(peer_up=fleet_pb2.PeerUp(peer=worker.peer()))
                worker.send(peer_up=fleet_pb2.PeerUp(peer=other.peer()))
        self._workers[worker.incarnation] = worker
        log.info(
            "worker attached", worker_id=hello.worker_id, role=inference_pb2.Role.Name(hello.role), num_workers=len(self._workers)
        )
        self._on_change()

    def remove(self, worker: WorkerHandle) -> None:
        """Its stream is over: attempts are lost, peers are told. Harmless when it was replaced."""
        if self._workers.get(worker.incarnation) is not worker:
            return
        del self._workers[worker.incarnation]
        self.pairs.forget(worker.incarnation)
        self._bad_pairs = {
            pair: until for pair, until in self._bad_pairs.items() if worker.incarnation not in (pair.prefill, pair.decode)
        }
        for other in self._workers.values():
            if other.is_prefill is not worker.is_prefill:
                other.send(peer_gone=fleet_pb2.PeerGone(incarnation=worker.incarnation))
        attempts, worker.attempts, worker.waiting_tokens = worker.attempts, {}, {}
        for events in attempts.values():
            events.on_lost(worker.incarnation)
        log.info("worker detached", worker_id=worker.hello.worker_id, attempts_lost=len(attempts), num_workers=len(self._workers))
        self._on_change()

    def strike(self, incarnation: bytes, reason: str, *, suspect_after: int = 1) -> None:
        """The worker said what cannot be true; after that many times it gets work only when there is nobody else."""
        worker = self._workers.get(incarnation)
        if worker is None:
            return
        worker.strikes += 1
        if worker.strikes >= suspect_after:
            worker.suspect_until = time.monotonic() + limits.SUSPECT_FOR_S
        log.warning("worker is wrong", worker_id=worker.hello.worker_id, reason=reason, strikes=worker.strikes)

    def drop_silent(self) -> None:
        """Ends the streams of workers that have not reported for DEAD_AFTER_S: frozen, or cut off without a word."""
        for worker in self._workers.values():
            if time.monotonic() - worker.reported_at > limits.DEAD_AFTER_S and not worker.is_gone.is_set():
                log.warning("worker does not report", worker_id=worker.hello.worker_id, limit_s=limits.DEAD_AFTER_S)
                worker.is_gone.set()

    def on_report(self, report: fleet_pb2.ReportRequest) -> None:
        """Mismatch when the worker is not attached, or not any more: it should attach anew."""
        worker = self._workers.get(report.incarnation)
        if worker is None:
            raise Mismatch("stale incarnation: attach again", reason="stale_incarnation")
        if report.HasField("load"):
            before = worker.load
            if clamp(report.load, worker.hello.capacity.total_blocks):
                self.strike(worker.incarnation, "impossible_load", suspect_after=3)
            worker.load = report.load
            worker.reported_at = time.monotonic()
            if worker.load.is_draining is not before.is_draining or worker.load.free_blocks > before.free_blocks:
                self._on_change()
        elif report.HasField("pair"):
            self._on_pair(worker, report.pair)

    def _on_pair(self, worker: WorkerHandle, measured: fleet_pb2.PairMeasurement) -> None:
        peer = self._workers.get(measured.peer_incarnation)
        if not is_possible(measured):
            self.strike(worker.incarnation, "impossible_pair", suspect_after=3)
        elif peer is not None and worker.is_prefill and not peer.is_prefill:  # else it went meanwhile
            self.pairs.record(Pair(worker.incarnation, peer.incarnation), measured)

    async def measure_pairs(self) -> None:
        """Every pair anew, within bounds (pairs.py)."""
        prefills = [w for w in self._workers.values() if w.is_prefill]
        decodes = [w for w in self._workers.values() if not w.is_prefill]

        def ask(prefill: bytes, decode: bytes) -> None:
            worker = self._workers.get(prefill)
            if worker is not None:
                worker.send(measure=fleet_pb2.Measure(peer_incarnation=decode))

        await self.pairs.measure([Pair(p.incarnation, d.incarnation) for p in prefills for d in decodes], ask)

    def describe(self) -> inference_pb2.GetFleetResponse:
        response = inference_pb2.GetFleetResponse()
        for worker in self._workers.values():
            hello, load = worker.hello, worker.load
            response.workers.add(
                worker_id=hello.worker_id, role=hello.role, is_draining=load.is_draining, incarnation=hello.incarnation.hex(),
                kv_dtype=hello.kv_format.dtype, block_size=hello.kv_format.block_size, total_blocks=load.total_blocks,
                free_blocks=load.free_blocks, running_sequences=load.running_sequences, queued_tokens=load.queued_tokens,
                prefill_tokens_per_s=load.prefill_tokens_per_s, decode_tokens_per_s=load.decode_tokens_per_s,
                resident_bytes=load.resident_bytes, held_slots=load.held_slots, machine=hello.machine,
            )  # fmt: skip
        for pair, known in self.pairs.items():
            prefill, decode, found = self._workers[pair.prefill].hello, self._workers[pair.decode].hello, known.measured
            response.pairs.add(
                prefill_worker_id=prefill.worker_id, decode_worker_id=decode.worker_id, transport=found.transport, path=found.path,
                round_trip_s=found.round_trip_s, round_trip_p99_s=found.round_trip_p99_s, bytes_per_s=found.bytes_per_s,
                memcpy_bytes_per_s=found.memcpy_bytes_per_s, age_s=time.monotonic() - known.measured_at,
                is_same_machine=bool(prefill.machine.machine_id) and prefill.machine.machine_id == decode.machine.machine_id,
            )  # fmt: skip
        return response

    def check(self, hello: fleet_pb2.Hello) -> None:
        """Whether this worker may join, or the error that says why not."""
        if hello.version.major != PROTOCOL_MAJOR:
            raise Mismatch(
                f"worker {hello.worker_id[:40]!r} speaks protocol {hello.version.major}.{hello.version.minor}, "
                f"this router {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}; run the same version",
                reason="version",
            )
        check_hello(hello)
        if len(self._workers) >= limits.MAX_WORKERS:
            raise Unavailable(f"{len(self._workers)} workers are attached, limit {limits.MAX_WORKERS}", reason="too_many_workers")
        theirs = fingerprint_from_wire(hello.fingerprint)
        for name, mine in (("config", self._model.config_digest), ("tokenizer", self._model.tokenizer_digest)):
            if getattr(theirs, name) != mine:
                raise Mismatch(
                    f"{name} of the model differs between this router and {hello.worker_id}; start both from the same model",
                    reason=f"fingerprint_{name}",
                )
        first = next((w for w in self._workers.values() if w.hello.worker_id != hello.worker_id), None)
        if first is not None:
            fingerprint_from_wire(first.hello.fingerprint).require_equal(theirs, first.hello.worker_id, hello.worker_id)
