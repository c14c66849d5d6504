"""A simulated fleet and its router, from the first arrival to the last token. Pure: placement, index and admission are the real ones.

1. A request arrives, asks for admission, and waits here until placement says where it starts (router/flow.py).
2. It is counted at its workers and credited in the index; its prompt takes its turn in the lane of who computes it.
3. With the first token it decodes there, or is shipped: as it was computed, as far as decode had room for it.
4. It ends. Whatever makes room lets those that wait be looked at again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from router.admission import Admission, AdmissionLimits, Ticket
from router.placement import Rules, place, wait_behind
from router.policies import PolicyName, make_policy
from router.prefix_index import PrefixIndex
from router.simulation.engine import Engine
from router.simulation.lane import Job
from router.simulation.overlap import shares
from router.simulation.pool import CachePool
from router.simulation.timeline import Timeline
from router.simulation.worker import REPORT_S, Worker
from router.views import Decision, Demand, Roles, Scan, Split, WorkerView, roles_of
from splitfire.core.errors import ConfigError, SplitfireError
from splitfire.core.workload_trace import Arrival, Trace

MAX_INDEXED = 50_000_000
MANY = 1_000_000_000
BESIDE_RUNS = 2


@dataclass(frozen=True, slots=True)
class Setup:
    """Who serves the trace. `is_shared`: all workers of a role have one cache together, and the router knows what is in it."""

    engine: Engine
    num_prefill: int  # 0: decode workers compute the prompts too
    num_decode: int
    policy: PolicyName = "cost"
    split: Split = "auto"
    is_shared: bool = False
    is_eager: bool | None = None  # workers queue, however much; as is usual: with every policy but cost
    seed: int = 0


def simulate(trace: Trace, setup: Setup) -> SimulatedFleet:
    """A fleet that has served the trace. Where prefill and decode workers slow one another down, by as much as both were busy at once: so
    a few times, each to see how much that was."""
    fleet = SimulatedFleet(trace, setup)
    fleet.run()
    engine = setup.engine
    if not setup.num_prefill or max(engine.prompt_beside, engine.step_beside) <= 1.0:
        return fleet
    for _ in range(BESIDE_RUNS):
        workers = fleet.workers.values()
        prefills = [worker.prompts.busy for worker in workers if worker.is_prefill]
        decodes = [worker.sequences.busy for worker in workers if not worker.is_prefill]
        of_prompts, of_steps = shares(prefills, decodes)
        fleet = SimulatedFleet(trace, replace(setup, engine=engine.beside(of_prompts, of_steps)))
        fleet.run()
    return fleet


class SimulatedFleet:
    """Runs one trace once."""

    def __init__(self, trace: Trace, setup: Setup) -> None:
        _check(trace, setup)
        self.jobs: list[Job] = []
        self._trace = trace
        self._setup = setup
        self._timeline = Timeline()
        self._random = Random(setup.seed)
        self._rules = Rules(setup.split, make_policy(setup.policy))
        self._is_eager = setup.policy != "cost" if setup.is_eager is None else setup.is_eager
        self._index = PrefixIndex(MAX_INDEXED, lambda: self._timeline.now)
        limits = AdmissionLimits(MANY, MANY, 1 << 60, 1e12, 1e12)
        self._admission: Admission[Scan, Decision] = Admission(limits, lambda: self._timeline.now, self._scan, self._random)
        self.workers = {worker.name: worker for worker in self._make_workers()}
        names = list(self.workers)
        for name in names:
            self._index.add(name, setup.engine.max_cached or setup.engine.num_blocks, is_exact=True)
        self._reports: dict[bytes, int] = dict.fromkeys(names, 0)  # how many each sent
        self._is_reporting: set[bytes] = set()
        self._rates = {name: setup.engine.bytes_per_s for name in names if name.startswith(b"d")}
        self._views: list[WorkerView] = []
        self._roles = Roles((), ())
        self._scanned: Scan | None = None

    def run(self) -> None:
        for number, arrival in enumerate(self._trace.arrivals):
            job = Job(number, arrival)
            self.jobs.append(job)
            self._timeline.at(arrival.at_s, lambda job=job: self._arrive(job))  # type: ignore[misc]
        self._timeline.run()
        assert all(job.ended_s is not None for job in self.jobs), "a request never ended"

    # -- the router

    def _arrive(self, job: Job) -> None:
        arrival = job.arrival
        cached, worker = self._best_cached(arrival)
        self._admission.request(
            Ticket(
                tenant="",
                weight=1.0,
                priority=2,
                num_tokens=arrival.num_tokens - cached,
                num_bytes=4 * arrival.num_tokens,
                work_s=worker.cost().seconds(arrival.num_tokens, cached),
                deadline=None,
                is_resumed=False,
                max_running=None,
                find_room=lambda scan: self._find_room(scan, arrival),
                start=lambda decision: self._start(job, decision),
                expire=_never,
            )
        )

    def _find_room(self, scan: Scan, arrival: Arrival) -> Decision | None:
        demand = Demand(arrival.num_tokens, ends_with_first_token=arrival.num_output == 1, depths=self._depths(arrival))
        decision = place(scan, demand, self._rules, self._random)
        if decision is None or decision.starts_now:
            return decision
        wait_behind(decision, scan)
        return None

    def _start(self, job: Job, decision: Decision) -> int:
        now, placement = self._timeline.now, decision.placement
        job.placement, job.dispatched_s = placement, now
        for name in filter(None, (placement.prefill, placement.decode)):
            self.workers[name].begin(job)
            if not self._setup.is_shared:
                self._index.credit(name, job.arrival.names)
        computing = self.workers[placement.computing]
        computing.queue(job, decision.compute_s, now)
        computing.compute(job)
        if self._scanned is not None:  # those after it see it
            self._look(self._scanned)
        return 1

    def _scan(self) -> Scan | None:
        self._scanned = Scan((), Roles((), ()), self._timeline.now)
        self._look(self._scanned)
        return self._scanned

    def _look(self, scan: Scan) -> None:
        now = self._timeline.now
        views = [worker.view(now, self._rates, is_eager=self._is_eager) for worker in self.workers.values()]
        if len(views) != len(self._views) or not all(map(operator.is_, views, self._views)):
            self._views, self._roles = views, roles_of(views)
        scan.workers, scan.roles = self._views, self._roles

    def _depths(self, arrival: Arrival) -> Mapping[bytes, int]:
        if self._setup.is_shared:
            depths = {worker.name: worker.pool.depth(arrival.names) for worker in self.workers.values()}
            return {name: depth for name, depth in depths.items() if depth}
        return self._index.depths(arrival.names)

    def _best_cached(self, arrival: Arrival) -> tuple[int, Worker]:
        """Tokens, and a worker that has as many."""
        depths = self._depths(arrival)
        best = max(self.workers.values(), key=lambda worker: depths.get(worker.name, 0))
        return min(depths.get(best.name, 0) * self._trace.block_size, arrival.num_tokens - 1), best

    def _report(self, worker: Worker) -> None:
        if worker.name in self._is_reporting:
            return
        self._is_reporting.add(worker.name)

        def tell() -> None:
            self._is_reporting.discard(worker.name)
            had = worker.free_blocks
            change = worker.report(self._reports[worker.name])
            self._reports[worker.name] += 1
            if not self._setup.is_shared:
                self._index.on_events(worker.name, change)
            if worker.free_blocks > had:
                self._admission.pump()

        self._timeline.at(self._timeline.now + REPORT_S, tell)

    # -- the workers

    def _make_workers(self) -> Iterator[Worker]:
        setup, engine = self._setup, self._setup.engine
        for kind, count in ((b"p", setup.num_prefill), (b"d", setup.num_decode)):
            shared = CachePool(engine.num_blocks * count, engine.max_cached and engine.max_cached * count)
            for number in range(count):
                pool = shared if setup.is_shared else CachePool(engine.num_blocks, engine.max_cached)
                yield Worker(b"%s%03d" % (kind, number), engine, self._timeline, pool, self)

    def on_started(self, worker: Worker, job: Job) -> None:
        """Its first chunk: decode is offered the hand-off."""
        decode = self._receiver(job)
        if decode is not None:
            decode.reserve(job, lambda: self._granted(worker, decode, job))

    def on_computed(self, worker: Worker, job: Job) -> None:
        now = self._timeline.now
        job.first_s = now
        worker.commit(job)
        worker.computed(job, now)
        self._report(worker)
        decode = self._receiver(job)
        if decode is not None:
            if job.granted_s is not None:
                self._ship(worker, decode, job)
        elif job.arrival.num_output > 1:
            worker.arrived(job)
            worker.sequences.decode(job)
        else:
            self.on_ended(worker, job)
        self._admission.pump()

    def on_ended(self, worker: Worker, job: Job) -> None:
        job.ended_s = self._timeline.now
        worker.end(job, self._timeline.now)
        worker.release(job)
        self._report(worker)
        self._admission.ended("")

    def _receiver(self, job: Job) -> Worker | None:
        """Who the prompt is shipped to."""
        placement = job.placement
        assert placement is not None
        return self.workers[placement.decode] if placement.prefill and placement.decode else None

    def _granted(self, prefill: Worker, decode: Worker, job: Job) -> None:
        job.granted_s = self._timeline.now
        if job.first_s is not None:
            self._ship(prefill, decode, job)

    def _ship(self, prefill: Worker, decode: Worker, job: Job) -> None:
        """What is left of it: all that decode has not, sent since it was granted and while nothing else was, and at least the last chunk."""
        assert job.started_s is not None and job.granted_s is not None
        now, engine = self._timeline.now, prefill.engine
        num_present = len(job.leases[decode.name].names)
        whole_s = (-(-job.arrival.num_tokens // engine.block_size) - num_present) * engine.block_bytes / engine.bytes_per_s
        last_s = whole_s * min(1.0, engine.chunk_tokens / (job.arrival.num_tokens - job.num_cached))
        begin = max(job.started_s, job.granted_s, prefill.ship_free_s)
        prefill.ship_free_s = max(begin + whole_s, now + last_s)

        def arrived() -> None:
            prefill.end(job, self._timeline.now)
            prefill.release(job)
            decode.commit(job)
            decode.arrived(job)
            decode.sequences.decode(job)
            self._report(prefill)
            self._report(decode)
            self._admission.pump()

        self._timeline.at(prefill.ship_free_s, arrived)


def _check(trace: Trace, setup: Setup) -> None:
    """Nothing may wait for ever."""
    engine = setup.engine
    if setup.num_decode < 1:
        raise ConfigError(f"{setup.num_decode} decode workers: at least 1")
    longest = max(trace.arrivals, key=lambda arrival: arrival.num_tokens + arrival.num_output)
    num_tokens = longest.num_tokens + longest.num_output
    if num_tokens > engine.num_blocks * engine.block_size:
        has = engine.num_blocks * engine.block_size
        raise ConfigError(f"a request of {num_tokens} tokens, prompt and answer, but a worker has room for {has}")


def _never(error: SplitfireError) -> None:
    raise AssertionError(f"nothing expires here: {error}")
