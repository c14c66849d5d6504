"""The fleet as this router knows it: attached workers, their attempts, what their caches hold. Event loop only.

A worker is its incarnation: a restart is another worker. When its Attach stream breaks, its attempts are lost and its
peers are told. Two workers are only ever paired if their model fingerprints are equal, which is checked at Hello.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf

import structlog

from router.costs import PromptCostFit
from router.guard import Guard
from router.hello import check_hello, clamp
from router.pairs import Pair, Pairs, is_possible
from router.prefix_index import CacheChange, PrefixIndex
from router.timeline import believed_s
from router.views import Placement, Roles, Scan, WorkerView, roles_of
from router.worker_handle import AttemptEvents, PromptWork, WorkerHandle
from splitfire.core import limits
from splitfire.core.errors import InvalidInput, Mismatch, NotFound, Unavailable
from splitfire.core.fingerprint import PROTOCOL_MAJOR, PROTOCOL_MINOR, Fingerprint
from splitfire.core.model_dir import ModelDir
from splitfire.core.wire import fingerprint_from_wire
from splitfire.v1 import fleet_pb2, inference_pb2

log = structlog.get_logger("router")
FIRST_PROMPT = 256  # tokens of a prompt, until some have come
NEWER = 0.05  # what each further one counts
ROLE_GRACE_S = 10.0  # for what runs at a worker that changes its role; what is left then goes on elsewhere
LEAVE_WITHIN_S = 10.0  # after that


class Fleet:
    """All attached workers. Event loop only."""

    def __init__(self, model: ModelDir, on_change: Callable[[], None]) -> None:
        self._model = model
        self._on_change = on_change
        self._workers: dict[bytes, WorkerHandle] = {}
        self.pairs = Pairs()
        self.guard = Guard(self._workers, on_change)
        self.handoffs: Counter[str] = Counter()  # that ended, by how: counted by attempts
        self._index = PrefixIndex(limits.MAX_INDEXED_BLOCKS, time.monotonic)
        self._views: list[WorkerView] = []
        self._roles = Roles((), ())
        self._views_until = 0.0  # not any more after that, or a touch
        self._max_context: int | None = None
        self._pool_tokens: int | None = None
        self._next_attempt = 1
        self._usual = PromptCostFit()  # what prompts cost, wherever they were computed
        self._usual_tokens = float(FIRST_PROMPT)  # to compute, of an attempt

    @property
    def workers(self) -> list[WorkerHandle]:
        return list(self._workers.values())

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the workers; None while there is none."""
        first = next(iter(self._workers.values()), None)
        return first.fingerprint if first is not None else None

    @property
    def model_digest(self) -> bytes:
        """Of that fingerprint; empty while there is none."""
        first = next(iter(self._workers.values()), None)
        return first.model_digest if first is not None else b""

    @property
    def max_context(self) -> int | None:
        """The shortest of the workers'; None while there is none."""
        return self._max_context

    @property
    def pool_tokens(self) -> int | None:
        """KV room of the largest decode pool."""
        return self._pool_tokens

    @property
    def num_routers(self) -> int:
        """That share the workers, as these say."""
        told = max((worker.load.num_routers for worker in self._workers.values()), default=1)
        return min(max(told, 1), limits.MAX_ROUTERS)

    def num_cached_blocks(self, incarnation: bytes) -> int:
        """Of a worker, as the prefix index knows."""
        return self._index.num_blocks(incarnation)

    def scan(self) -> Scan:
        """Every worker as it is now."""
        self._look()
        return Scan(self._views, self._roles, time.monotonic())

    def look_again(self, scan: Scan) -> bool:
        """Brings a scan up to date; whether anything had changed."""
        self._look()
        is_new = scan.workers is not self._views
        scan.workers, scan.roles = self._views, self._roles
        return is_new

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._views_until:
            self._views = [worker.view(now) for worker in self._workers.values()]
            self._roles = roles_of(self._views)
            self._views_until = min((worker.view_until for worker in self._workers.values()), default=inf)

    def _touched(self) -> None:
        """A worker is not what it was."""
        self._views_until = 0.0

    def depths(self, names: Sequence[int]) -> Mapping[bytes, int]:
        """Of the blocks with these short names, how many leading ones each worker has cached."""
        return self._index.depths(names)

    # -- attempts

    def begin(self, placement: Placement, work: PromptWork, events: AttemptEvents, names: Sequence[int] = ()) -> int:
        """Counts an attempt at its workers from now on, before anything is sent; its number."""
        attempt = self._next_attempt
        self._next_attempt += 1
        for incarnation in filter(None, (placement.prefill, placement.decode)):
            self._workers[incarnation].begin(attempt, events, work.num_tokens)
            self._index.credit(incarnation, names)
        self._workers[placement.computing].queue(attempt, work, time.monotonic())
        self._usual_tokens += NEWER * (work.num_tokens - work.num_cached - self._usual_tokens)
        return attempt

    def move(self, attempt: int, source: bytes | None, target: bytes, num_tokens: int, events: AttemptEvents) -> None:
        """Another decode worker takes the attempt; the one before, if it is still there, lets go of it."""
        if source is not None:
            self.end(attempt, source, "redirected")
        self._workers[target].begin(attempt, events, num_tokens)

    def has(self, attempt: int, incarnation: bytes | None) -> bool:
        """Whether the attempt is open at a worker that is attached."""
        worker = self._workers.get(incarnation) if incarnation is not None else None
        return worker is not None and attempt in worker.attempts

    def avoid_pair(self, prefill: bytes, decode: bytes) -> None:
        """A transfer between these two broke though both live (F31): for a while they are paired only if there is nobody else."""
        worker = self._workers.get(prefill)
        if worker is not None and decode in self._workers:
            worker.bad_until[decode] = time.monotonic() + limits.BAD_PAIR_S
            worker.touch()

    def started(self, attempt: int, placement: Placement) -> None:
        """The first token came: its prompt waits for nobody any more."""
        worker = self._workers.get(placement.computing)
        if worker is not None and worker.computed(attempt, time.monotonic()):
            self._on_change()

    def computed(self, attempt: int, incarnation: bytes, work: PromptWork, timing: fleet_pb2.WorkerTiming) -> None:
        """What a prompt's first token says of the worker that computed it."""
        worker = self._workers.get(incarnation)
        seconds = sum(believed_s(phase.duration_s) for phase in timing.phases if phase.name == "prefill")
        if worker is not None and seconds:
            worker.measured(attempt, work, min(timing.cached_tokens, work.num_tokens), seconds)
            self._touch_unknown()

    def arrived(self, attempt: int, incarnation: bytes) -> None:
        """The first token that was made there: its KV is all there."""
        worker = self._workers.get(incarnation)
        if worker is not None:
            worker.arrived(attempt)

    def reserve(self, who: object) -> None:
        """A decode worker takes nobody else's requests until `release`: the least busy one that is left."""
        able = [w for w in self._workers.values() if not w.is_prefill and w.view(time.monotonic()).can_take]
        if able and not any(w.reserved_for is who for w in able):
            worker = min(able, key=lambda w: (w.reserved_for is not None, w.num_running))
            if worker.reserved_for is None:
                worker.reserved_for = who
                worker.touch()

    def release(self, who: object) -> None:
        """It does not want to be alone any more."""
        for worker in self._workers.values():
            if worker.reserved_for is who:
                worker.reserved_for = None
                worker.touch()
                self._on_change()

    @property
    def prompt_tokens_per_s(self) -> float:
        """At which the fleet computes prompts of the usual length, all in all; 0 until measured."""
        views = [view for view in self.scan().workers if view.can_take]
        computing = [view for view in views if view.is_prefill] or views
        if not self._usual.is_known:
            return 0.0
        num_tokens = max(1, round(self._usual_tokens))
        return sum(num_tokens / max(view.cost.seconds(num_tokens), 1e-9) for view in computing)

    def end(self, attempt: int, incarnation: bytes | None, cancel_reason: str | None, placement: Placement | None = None) -> None:
        """The attempt is over at one worker, or (None) at all of its `placement`; told to the worker when a reason is given."""
        now = time.monotonic()
        where = (incarnation,) if placement is None else (placement.prefill, placement.decode)
        for name in where:
            worker = self._workers.get(name) if name is not None else None
            if worker is not None and worker.end(attempt, now) and cancel_reason is not None:
                worker.send(cancel=fleet_pb2.Cancel(attempt=attempt, reason=cancel_reason))
        self._on_change()

    def cancel_choice(self, attempt: int, choice: int, reason: str, placement: Placement, *, but_at: bytes | None = None) -> None:
        """One of an attempt's choices is over; told to every worker (or all but one) that has the others."""
        for name in (placement.prefill, placement.decode):
            worker = self._workers.get(name) if name is not None else None
            if worker is not None and attempt in worker.attempts:
                worker.touch()
                if worker.incarnation != but_at:
                    worker.send(cancel=fleet_pb2.Cancel(attempt=attempt, choice=choice, reason=reason))
        self._on_change()

    # -- workers

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
        worker.usual, worker.on_touch = self._usual, self._touched
        self._workers[worker.incarnation] = worker
        self._count()
        if not hello.has_no_prefix_cache:
            self._index.add(worker.incarnation, hello.capacity.total_blocks, is_exact=hello.sends_cache_events)
        self.guard.attached(worker)
        log.info(
            "worker attached", worker_id=hello.worker_id, role=inference_pb2.Role.Name(hello.role), num_workers=len(self._workers)
        )
        self._on_change()

    def remove(self, worker: WorkerHandle) -> None:
        """Its stream is over: attempts are lost, peers are told. Harmless when it was replaced."""
        if self._workers.get(worker.incarnation) is not worker:
            return
        del self._workers[worker.incarnation]
        self._count()
        self.pairs.forget(worker.incarnation)
        self._index.remove(worker.incarnation)
        for other in self._workers.values():
            other.peer_rates.pop(worker.incarnation, None)
            other.bad_until.pop(worker.incarnation, None)
            if other.is_prefill is not worker.is_prefill:
                other.send(peer_gone=fleet_pb2.PeerGone(incarnation=worker.incarnation))
        is_death = not worker.is_draining
        self.guard.detached(worker, is_death=is_death)
        attempts, worker.attempts = worker.attempts, {}
        worker.prompts.clear()
        for events in attempts.values():
            events.on_lost(worker.incarnation, is_death=is_death)
        log.info("worker detached", worker_id=worker.hello.worker_id, attempts_lost=len(attempts), num_workers=len(self._workers))
        self._on_change()

    def _count(self) -> None:
        """Workers came or went."""
        workers = self._workers.values()
        pools = [w.hello.capacity.total_blocks * w.hello.kv_format.block_size for w in workers if not w.is_prefill]
        self._pool_tokens = max(pools, default=None)
        self._max_context = min((w.hello.capacity.max_context for w in workers), default=None)
        self._touched()

    def strike(self, incarnation: bytes, reason: str, *, suspect_after: int = 1) -> None:
        """The worker said what cannot be true; after that many times it gets work only when there is nobody else."""
        worker = self._workers.get(incarnation)
        if worker is None:
            return
        worker.strikes += 1
        if worker.strikes >= suspect_after:
            worker.suspect_until = time.monotonic() + limits.SUSPECT_FOR_S
            worker.touch()
        log.warning("worker is wrong", worker_id=worker.hello.worker_id, reason=reason, strikes=worker.strikes)

    def drop_silent(self) -> None:
        """Ends the streams of workers that have not reported for DEAD_AFTER_S: frozen, or cut off without a word; and of those that were
        told to leave, and stay."""
        for worker in self._workers.values():
            if time.monotonic() - worker.reported_at > limits.DEAD_AFTER_S and not worker.is_gone.is_set():
                log.warning("worker does not report", worker_id=worker.hello.worker_id, limit_s=limits.DEAD_AFTER_S)
                worker.is_gone.set()
                worker.touch()
            elif time.monotonic() > worker.leave_by and not worker.is_gone.is_set():
                log.warning("worker does not change its role", worker_id=worker.hello.worker_id)
                worker.is_gone.set()
        self.guard.look()

    def on_report(self, report: fleet_pb2.ReportRequest) -> bool:
        """Mismatch when the worker is not attached, or not any more: it should attach anew. False: what it told of its cache has a gap;
        it should tell all of it again."""
        worker = self._workers.get(report.incarnation)
        if worker is None:
            raise Mismatch("stale incarnation: attach again", reason="stale_incarnation")
        if report.HasField("load"):
            before = worker.load
            if clamp(report.load, worker.hello.capacity.total_blocks):
                self.strike(worker.incarnation, "impossible_load", suspect_after=3)
            worker.report(report.load, time.monotonic())
            if not self._usual.is_measured:
                self._touch_unknown()
            if worker.load.is_draining is not before.is_draining:
                self.guard.look()
            if worker.load.is_draining is not before.is_draining or worker.load.free_blocks > before.free_blocks:
                self._on_change()
        elif report.HasField("pair"):
            self._on_pair(worker, report.pair)
        elif report.HasField("cache_events") and worker.hello.sends_cache_events:
            events = report.cache_events
            change = CacheChange(events.sequence, events.stored, events.removed, events.is_snapshot, events.is_last_page)
            return self._index.on_events(worker.incarnation, change)
        return True

    def _touch_unknown(self) -> None:
        """What prompts cost anywhere has changed, which is what they cost at workers that are not known themselves."""
        for worker in self._workers.values():
            if not worker.is_known:
                worker.touch()

    def _on_pair(self, worker: WorkerHandle, measured: fleet_pb2.PairMeasurement) -> None:
        peer = self._workers.get(measured.peer_incarnation)
        if not is_possible(measured):
            self.strike(worker.incarnation, "impossible_pair", suspect_after=3)
        elif peer is not None and worker.is_prefill and not peer.is_prefill:  # else it went meanwhile
            self.pairs.record(Pair(worker.incarnation, peer.incarnation), measured)
            worker.peer_rates[peer.incarnation] = measured.bytes_per_s
            worker.touch()

    def change_role(self, worker_id: str, role: inference_pb2.Role.ValueType) -> None:
        """Tells a worker to take on the other role. It finishes or gives back what it has, and attaches anew."""
        worker = next((w for w in self._workers.values() if w.hello.worker_id == worker_id), None)
        if worker is None:
            raise NotFound(f"no worker is called {worker_id}; GetFleet names those that are attached", reason="no_worker")
        mine = inference_pb2.Role.Name(worker.hello.role).removeprefix("ROLE_").lower()
        if worker.hello.role == role:
            raise InvalidInput("role", f"{worker_id} is a {mine} worker already")
        now = time.monotonic()
        if worker.is_draining:
            raise Unavailable(f"{worker_id} is leaving: ask again when it has", reason="draining", retry_after_s=ROLE_GRACE_S)
        others = [w for w in self._workers.values() if w is not worker and w.is_prefill is worker.is_prefill]
        if not any(other.view(now).can_take for other in others):
            raise InvalidInput("worker_id", f"{worker_id} is the last {mine} worker; attach another one first")
        worker.is_leaving, worker.leave_by = True, now + ROLE_GRACE_S + LEAVE_WITHIN_S
        worker.touch()
        worker.send(change_role=fleet_pb2.ChangeRole(role=role, grace_s=ROLE_GRACE_S))
        log.info("worker changes its role", worker_id=worker_id, role=inference_pb2.Role.Name(role))
        self.guard.look()
        self._on_change()

    async def measure_pairs(self) -> None:
        """Every pair anew, within bounds (pairs.py)."""
        prefills = [w for w in self._workers.values() if w.is_prefill]
        decodes = [w for w in self._workers.values() if not w.is_prefill]

        def ask(prefill: bytes, decode: bytes) -> None:
            worker = self._workers.get(prefill)
            if worker is not None:
                worker.send(measure=fleet_pb2.Measure(peer_incarnation=decode))

        await self.pairs.measure([Pair(p.incarnation, d.incarnation) for p in prefills for d in decodes], ask)

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
