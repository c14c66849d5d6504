"""One attached worker, as this router counts it: what it was sent and has not answered, what it reported, what it is like. Event loop only.

The view that placement sees is made anew only when something changed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from router.costs import PromptCost, PromptCostFit
from router.views import AGEING, QueuedPrompt, WorkerView
from splitfire.core import limits
from splitfire.core.wire import fingerprint_from_wire, layout_from_wire
from splitfire.v1 import fleet_pb2, inference_pb2

log = structlog.get_logger("router")
MAX_CHUNK_S = 0.25  # a worker cuts its chunks to that
FEW_PROMPTS = 8  # tell of a worker more than all others do
FREED_OVER_S = 10.0  # what the rate of freed KV is averaged over


class AttemptEvents(Protocol):
    """Who an attempt's frames go to."""

    @property
    def num_choices(self) -> int:
        """That have not ended in it."""

    def on_output(self, incarnation: bytes, output: fleet_pb2.SequenceOutput) -> None: ...

    def on_finished(self, incarnation: bytes, finished: fleet_pb2.Finished) -> None: ...

    def on_refused(self, incarnation: bytes, refused: fleet_pb2.Refused) -> None: ...

    def on_lost(self, incarnation: bytes, *, is_death: bool) -> None:
        """The worker is gone, or (no death) left on purpose."""


@dataclass(frozen=True, slots=True)
class PromptWork:
    """A prompt as it was placed: tokens, those expected in the cache of who computes it, and the seconds that takes."""

    num_tokens: int
    num_cached: int
    seconds: float


@dataclass(eq=False)
class WorkerHandle:
    """`outbox` is bounded: a worker that does not read its stream is dropped. Whoever changes what a view shows calls `touch`."""

    hello: fleet_pb2.Hello
    outbox: asyncio.Queue[fleet_pb2.AttachResponse] = field(default_factory=lambda: asyncio.Queue(limits.MAX_FRAMES_QUEUED))
    attempts: dict[int, AttemptEvents] = field(default_factory=dict)
    prompts: dict[int, QueuedPrompt] = field(default_factory=dict)  # to compute here, whose first token has not come
    num_tokens: dict[int, int] = field(default_factory=dict)  # of KV that each attempt wants here; only where it generates
    promised: dict[int, int] = field(default_factory=dict)  # of those whose KV is not there: some is reserved, some not yet
    load: fleet_pb2.Load = field(default_factory=fleet_pb2.Load)
    fit: PromptCostFit = field(default_factory=PromptCostFit)
    usual: PromptCostFit = field(default_factory=PromptCostFit)  # of the whole fleet, until this one's is known
    peer_rates: dict[bytes, float] = field(default_factory=dict)  # bytes per second to decode workers
    bad_until: dict[bytes, float] = field(default_factory=dict)  # peers a transfer with whom broke
    reported_at: float = field(default_factory=lambda: time.monotonic())
    active_at: float = field(default_factory=time.monotonic)  # when something ended here, or it attached
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_replaced: bool = False  # by another process under its name
    is_leaving: bool = False  # on purpose: what it has goes on elsewhere, and nobody is blamed
    leave_by: float = math.inf  # when it has to have left
    is_ejected: bool = False  # gets no work until a probe succeeds
    reserved_for: object = None  # a request that is to run alone
    num_dropped: int = 0  # frames of attempts that are not here: unknown, finished, another router's
    strikes: int = 0  # reports that cannot be true, protocol errors
    suspect_until: float = 0.0
    _passed: set[int] = field(default_factory=set)  # attempts whose prompts shorter ones came before
    _arrived: list[int] = field(default_factory=list)  # attempts whose KV is there; the next report counts it
    _front_since: float = 0.0  # when the first of `prompts` began
    _freed_rate: float = 0.0
    _freed_at: float = 0.0
    _view: WorkerView | None = None
    view_until: float = 0.0  # it is not true any more after that, though nothing has happened
    on_touch: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._block_bytes = layout_from_wire(self.hello.kv_format).block_bytes
        self.fingerprint = fingerprint_from_wire(self.hello.fingerprint)
        self.model_digest = self.fingerprint.digest

    @property
    def incarnation(self) -> bytes:
        return self.hello.incarnation

    @property
    def is_prefill(self) -> bool:
        return self.hello.role == inference_pb2.ROLE_PREFILL

    @property
    def is_known(self) -> bool:
        """Whether prompts cost here what they did here, because a few have told; if not, what they cost anywhere."""
        return self.fit.num_measured >= FEW_PROMPTS

    @property
    def cost(self) -> PromptCost:
        return self.fit.cost if self.is_known else self.usual.cost

    @property
    def is_draining(self) -> bool:
        """It takes nothing new, on purpose."""
        return self.load.is_draining or self.is_leaving

    @property
    def num_running(self) -> int:
        """What this router dispatched and has not seen end: attempts, of a decode worker their choices."""
        return len(self.attempts) if self.is_prefill else sum(events.num_choices for events in self.attempts.values())

    def send(self, **frame: object) -> None:
        try:
            self.outbox.put_nowait(fleet_pb2.AttachResponse(**frame))  # type: ignore[arg-type]
        except asyncio.QueueFull:
            log.error("worker does not read its stream", worker_id=self.hello.worker_id)
            self.is_gone.set()
            self.touch()

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

    # -- what it was sent

    def begin(self, attempt: int, events: AttemptEvents, num_tokens: int) -> None:
        """Counts an attempt that generates here, or computes its prompt here, or both."""
        self.attempts[attempt] = events
        if not self.is_prefill:
            self.num_tokens[attempt] = self.promised[attempt] = num_tokens
        self.touch()

    def queue(self, attempt: int, work: PromptWork, now: float) -> None:
        """The attempt's prompt is computed here."""
        if not self.prompts:
            self._front_since = now
        key = -math.inf if self.hello.capacity.is_first_come else now + AGEING * work.seconds  # nobody passes who came first
        self._passed.update(other for other, prompt in self.prompts.items() if prompt.key > key)
        self.prompts[attempt] = QueuedPrompt(key, work.seconds)
        self.touch()

    def computed(self, attempt: int, now: float) -> bool:
        """Its first token came, or it is over: whether it was queued here."""
        if self.prompts.pop(attempt, None) is None:
            return False
        self._passed.discard(attempt)
        self._front_since = now
        self.touch()
        return True

    def arrived(self, attempt: int) -> None:
        """Its KV is here: the next report counts it."""
        if attempt in self.promised:
            self._arrived.append(attempt)

    def end(self, attempt: int, now: float) -> bool:
        """Over here; whether it was open."""
        if self.attempts.pop(attempt, None) is None:
            return False
        self.active_at = now
        self.computed(attempt, now)
        self.promised.pop(attempt, None)
        self._freed(self.num_tokens.pop(attempt, 0), now)
        self.touch()
        return True

    # -- what it says

    def report(self, load: fleet_pb2.Load, now: float) -> None:
        self.load, self.reported_at = load, now
        for attempt in self._arrived:
            self.promised.pop(attempt, None)
        self._arrived.clear()
        self.fit.start_with(load.prefill_tokens_per_s)
        self.usual.start_with(load.prefill_tokens_per_s)
        self.touch()

    def measured(self, attempt: int, work: PromptWork, num_cached: int, seconds: float) -> None:
        """A prompt took so long here; one that others passed waited for them meanwhile, and tells nothing."""
        if attempt in self._passed:
            return
        self.fit.measured(work.num_tokens, num_cached, seconds)
        self.usual.measured(work.num_tokens, num_cached, seconds)
        self.touch()

    # -- what placement sees

    def touch(self) -> None:
        self._view = None
        self.on_touch()

    def is_able(self, now: float) -> bool:
        """Whether it could take work, if nothing is known against it."""
        return not (self.is_silent(now) or self.is_draining or self.is_gone.is_set())

    def is_silent(self, now: float) -> bool:
        """Not heard of for so long that it gets work only when there is nobody else."""
        return now >= self.reported_at + limits.SUSPECT_AFTER_S

    def view(self, now: float) -> WorkerView:
        if self._view is None or now >= self.view_until:
            self._view, self.view_until = self._look(now), self._next_change(now)
        return self._view

    def _look(self, now: float) -> WorkerView:
        capacity, load, block_size = self.hello.capacity, self.load, self.hello.kv_format.block_size
        cost = self.cost
        return WorkerView(
            incarnation=self.incarnation,
            is_prefill=self.is_prefill,
            can_take=not (self.is_draining or self.is_gone.is_set() or self.is_ejected),
            num_running=self.num_running + load.other_sequences,
            max_running=capacity.max_running,
            free_tokens=load.free_blocks * block_size - max(0, sum(self.promised.values()) - load.reserved_blocks * block_size),
            block_size=block_size,
            block_bytes=self._block_bytes,
            chunk_s=min(MAX_CHUNK_S, cost.seconds(capacity.chunk_tokens)),
            cost=cost,
            queue=tuple(self.prompts.values()),
            front_since=self._front_since,
            other_queue_s=cost.seconds(load.other_queued_tokens) if load.other_queued_tokens else 0.0,
            step_s=load.step_s,
            freed_tokens_per_s=self._freed_rate * math.exp((self._freed_at - now) / FREED_OVER_S),
            is_suspect=now < self.suspect_until or self.is_silent(now),
            is_reserved=self.reserved_for is not None,
            bad_peers=frozenset(peer for peer, until in self.bad_until.items() if now < until),
            peer_bytes_per_s=dict(self.peer_rates),
        )

    def _next_change(self, now: float) -> float:
        """When the view is not true any more though nothing has happened."""
        instants: Sequence[float] = (self.reported_at + limits.SUSPECT_AFTER_S, self.suspect_until, *self.bad_until.values())
        return min((instant for instant in instants if instant > now), default=math.inf)

    def _freed(self, num_tokens: int, now: float) -> None:
        """KV that an end gave back, as a decaying sum."""
        self._freed_rate = self._freed_rate * math.exp((self._freed_at - now) / FREED_OVER_S) + num_tokens / FREED_OVER_S
        self._freed_at = now
