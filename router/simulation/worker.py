"""One worker: its engine, pool and lanes, and what the router counts and was told of it, as `router/worker_handle.py` does. Pure.

A worker reports REPORT_S after something changed: cache events, free blocks, the time of its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from router.costs import PromptCost, PromptCostFit
from router.prefix_index import CacheChange
from router.simulation.engine import Engine
from router.simulation.lane import Job, Lane
from router.simulation.pool import CachePool
from router.simulation.timeline import Timeline
from router.views import AGEING, QueuedPrompt, WorkerView

REPORT_S = 0.05
FREED_OVER_S = 10.0
MAX_CHUNK_S = 0.25


class Events(Protocol):
    """The fleet's."""

    def on_started(self, worker: Worker, job: Job) -> None: ...

    def on_computed(self, worker: Worker, job: Job) -> None: ...

    def on_ended(self, worker: Worker, job: Job) -> None: ...


class Worker:
    """Tells `events` how far its jobs are; what follows from that here, it is told."""

    def __init__(self, name: bytes, engine: Engine, timeline: Timeline, pool: CachePool, events: Events) -> None:
        self.name = name
        self.is_prefill = name.startswith(b"p")
        self.engine = engine
        self.pool = pool
        self._events = events
        self._timeline = timeline

        def make_lane() -> Lane:
            return Lane(timeline, engine, self._admit, partial(events.on_computed, self), partial(events.on_ended, self))

        self.prompts = make_lane()
        self.sequences = self.prompts if engine.shares_steps else make_lane()
        self.uncached_s = 0.0  # of prompts computed here, had each been alone
        self.ship_free_s = 0.0
        self._waiting: list[tuple[Job, Callable[[], None]]] = []  # for room that a hand-off needs
        self._num_taken = 0  # tokens of prompts that came here, or their number
        # -- as the router counts
        self._running: dict[int, int] = {}  # tokens of KV that each wants here
        self._queue: dict[int, QueuedPrompt] = {}
        self._promised: dict[int, int] = {}
        self._arrived: list[int] = []
        self._front_since = 0.0
        self._fit = PromptCostFit()
        self._fit.start_with(1.0 / engine.prompt.token_s)
        self.free_blocks = pool.num_blocks  # as last reported
        self._step_s = 0.0
        self._freed_rate = self._freed_at = 0.0
        self._view: WorkerView | None = None

    # -- the worker

    def compute(self, job: Job) -> None:
        """Takes its turn by what is to be computed; first in, first out where the engine is like that."""
        arrival, engine = job.arrival, self.engine
        num_new = arrival.num_tokens - min(self.pool.depth(arrival.names) * engine.block_size, arrival.num_tokens - 1)
        job.key = self._num_taken + (0.0 if engine.is_fifo else AGEING * num_new)
        self._num_taken += num_new
        self.prompts.compute(job)

    def reserve(self, job: Job, on_granted: Callable[[], None]) -> None:
        """Room for a prompt that is computed elsewhere; those that wait for it get it in turn."""
        self._waiting.append((job, on_granted))
        self._grant()

    def commit(self, job: Job) -> None:
        """Its prompt's KV is all here."""
        lease = job.leases[self.name]
        self.pool.commit(lease, job.arrival.names[len(lease.names) :])

    def release(self, job: Job) -> None:
        self.pool.release(job.leases.pop(self.name))
        self._grant()
        self.prompts.look()

    def _grant(self) -> None:
        while self._waiting and self._lease(self._waiting[0][0]):
            self._waiting.pop(0)[1]()

    def _admit(self, job: Job) -> bool:
        if not self._lease(job):
            return False
        job.num_cached = min(len(job.leases[self.name].names) * self.engine.block_size, job.arrival.num_tokens - 1)
        job.num_computed = job.num_cached
        self.uncached_s += self.engine.prompt.seconds(job.arrival.num_tokens, job.num_cached)
        job.started_s = self._timeline.now
        self._events.on_started(self, job)
        return True

    def _lease(self, job: Job) -> bool:
        """Whether there is room: for its answer too, where that is generated."""
        num_tokens = job.arrival.num_tokens + (0 if self.is_prefill else job.arrival.num_output)
        lease = self.pool.admit(job.arrival.names, -(-num_tokens // self.engine.block_size))
        if lease is None:
            return False
        job.leases[self.name] = lease
        return True

    # -- the router's count of it

    def begin(self, job: Job) -> None:
        self._running[job.number] = self._promised[job.number] = job.arrival.num_tokens
        self._view = None

    def queue(self, job: Job, seconds: float, now: float) -> None:
        if not self._queue:
            self._front_since = now
        key = -math.inf if self.engine.is_fifo else now + AGEING * seconds  # nobody passes who came first
        self._queue[job.number] = QueuedPrompt(key, seconds)
        self._view = None

    def computed(self, job: Job, now: float) -> None:
        assert job.started_s is not None
        del self._queue[job.number]
        self._front_since = now
        self._fit.measured(job.arrival.num_tokens, job.num_cached, job.computed_s)
        self._view = None

    def arrived(self, job: Job) -> None:
        self._arrived.append(job.number)

    def end(self, job: Job, now: float) -> None:
        num_tokens = self._running.pop(job.number)
        self._promised.pop(job.number, None)
        self._freed_rate = self._freed_rate * math.exp((self._freed_at - now) / FREED_OVER_S) + num_tokens / FREED_OVER_S
        self._freed_at = now
        self._view = None

    def report(self, sequence: int) -> CacheChange:
        """What the router is told now."""
        for number in self._arrived:
            self._promised.pop(number, None)
        self._arrived.clear()
        self.free_blocks = self.pool.num_available
        self._step_s = self.sequences.step_s or self._step_s
        self._view = None
        stored, removed = self.pool.take_changes()
        return CacheChange(sequence, stored, removed)

    def cost(self) -> PromptCost:
        return self._fit.cost

    def view(self, now: float, peer_rates: Mapping[bytes, float], *, is_eager: bool) -> WorkerView:
        if self._view is None:
            engine, cost = self.engine, self._fit.cost
            self._view = WorkerView(
                incarnation=self.name,
                is_prefill=self.is_prefill,
                can_take=True,
                num_running=len(self._running),
                max_running=engine.max_running,
                free_tokens=self.free_blocks * engine.block_size - (0 if self.is_prefill else sum(self._promised.values())),
                block_size=engine.block_size,
                block_bytes=engine.block_bytes,
                chunk_s=math.inf if is_eager else min(MAX_CHUNK_S, cost.seconds(engine.chunk_tokens)),
                cost=cost,
                queue=tuple(self._queue.values()),
                front_since=self._front_since,
                step_s=self._step_s,
                freed_tokens_per_s=self._freed_rate * math.exp((self._freed_at - now) / FREED_OVER_S),
                peer_bytes_per_s=peer_rates if self.is_prefill else {},
            )
        return self._view
