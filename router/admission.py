"""Who may start, who waits, who is refused. Pure: tickets, what bounds them, and the pump that starts them.

1. A ticket that somebody has room for starts at once; the others wait, here and not at the workers (order: waiting.py, fairness.py).
2. One that breaks a bound of the queue is refused at once (bounds.py), as is one whose start is predicted too late for its first token.
3. Whatever makes room calls `pump`, which starts what can start. It looks past tickets whose best worker is busy: each has told the scan,
   so those after it know who is before them at that worker.
4. What has waited too long is dropped rather than served late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Generic, TypeVar

from router.bounds import QUEUE_PERCENT, QueueBounds
from router.drain_rate import DrainRate
from router.fairness import OUTPUT_COST, Place
from router.running import Running
from router.views import AGEING
from router.waiting import SYSTEM, Waiting
from splitfire.core.errors import DeadlineExceeded, Exhausted, Preempted, SplitfireError

Scan = TypeVar("Scan")
Room = TypeVar("Room")

LOOKAHEAD = 32  # tickets that one pump looks past
RISES = 4  # classes that a ticket would rise by in the time it may wait: batch is level with interactive after half of it
STARTED_S = 0.25  # of the wait of a prompt that has started already: for the chunk before it
UNKNOWN_WAIT_S = 1.0
LEAST_RETRY_S, MOST_RETRY_S, RETRY_JITTER = 0.1, 60.0, 0.25


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds. A request counts with its bytes until it starts."""

    max_running: int
    max_queued: int
    max_queued_bytes: int
    max_queued_s: float
    ttft_target_s: float  # nobody waits who is predicted to wait longer; of lower classes less, as of the other bounds


@dataclass(eq=False, slots=True)
class Ticket(Generic[Scan, Room]):
    """One choice of a request, or all of them, that want to start. `start` is called with the room that `find_room` found and returns
    how many choices start with it, `expire` when they may not."""

    tenant: str
    weight: float
    priority: int  # batch, standard, interactive, system: 1 to 4
    num_tokens: int  # to compute before the first token
    num_bytes: int
    work_s: float  # what computing them is predicted to take
    deadline: float | None  # never started after it
    is_resumed: bool  # has streamed already: before new ones of its level; at most as many as may run wait beside the other bounds
    max_running: int | None  # choices of the tenant that may run; a ticket of several may exceed it by its others
    find_room: Callable[[Scan], Room | None]
    start: Callable[[Room], int]
    expire: Callable[[SplitfireError], None]
    number: int = -1
    level: int = 0  # that it started at


class Admission(Generic[Scan, Room]):
    """Counts what runs and what waits. `begin_scan` looks at the fleet; None when nobody there has any room."""

    def __init__(
        self, limits: AdmissionLimits, clock: Callable[[], float], begin_scan: Callable[[], Scan | None], random: Random
    ) -> None:
        self.limits = limits
        self.rate_tokens_per_s = 0.0  # of prompts, all workers together, as measured; 0: not known, so nobody is refused for it
        self.queued_work_s = 0.0
        self._clock = clock
        self._begin_scan = begin_scan
        self._random = random
        self._tickets: dict[int, Ticket[Scan, Room]] = {}
        self._waiting = Waiting(limits.max_queued_s / RISES)
        self._bounds = QueueBounds(limits.max_queued, limits.max_queued_bytes)
        self._running = Running(limits.max_running)
        self._drain = DrainRate()
        self._num_arrived = 0
        self._is_pumping = False
        self._is_pump_due = False

    @property
    def num_running(self) -> int:
        return self._running.num

    @property
    def num_queued(self) -> int:
        return len(self._tickets)

    @property
    def queued_tokens(self) -> int:
        return self._waiting.num_tokens

    @property
    def queued_bytes(self) -> int:
        """Without those that resume, whose ids their answers hold anyway."""
        return self._bounds.num_bytes

    def request(self, ticket: Ticket[Scan, Room]) -> None:
        """Starts the ticket now, or queues it; Exhausted when it may not wait."""
        place = self._enter(ticket)
        self.pump()
        if place.number not in self._tickets:
            return
        try:
            given = self._make_way(place)
        except Exhausted:
            self._leave(place.number)
            raise
        for other in given:
            message = "gave its place in the full queue to a higher class, or to a tenant that has less in it"
            self._expire(other, Preempted(message, reason="preempted", retry_after_s=self._retry_after(self.queued_tokens)))

    def withdraw(self, ticket: Ticket[Scan, Room]) -> None:
        """The request does not want to start any more; harmless when it has."""
        if ticket.number in self._tickets:
            self._leave(ticket.number)

    def ended(self, tenant: str) -> None:
        """A choice that was started is over."""
        self._running.end(tenant)
        self.pump()

    def charge(self, ticket: Ticket[Scan, Room], output_tokens: int) -> None:
        """So much came out of a ticket that has started."""
        self._waiting.charge(ticket.level, ticket.tenant, OUTPUT_COST * output_tokens / ticket.weight)

    def pump(self) -> None:
        """Drops what expired and starts what can start. What starts may call it again: that is done after, not within."""
        self._is_pump_due = True
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            while self._is_pump_due:
                self._is_pump_due = False
                self._drop_expired()
                self._start_some()
                self._drain.look(self._clock(), is_waiting=bool(self._tickets))
        finally:
            self._is_pumping = False

    # -- inside

    def _start_some(self) -> None:
        if not self._tickets or self._running.is_full(SYSTEM):
            return
        scan = self._begin_scan()
        if scan is None:
            return
        num_passed = 0
        for place in self._waiting.in_order(self._running.is_at_quota):
            if self._running.is_full(self._waiting.level(place.number)):
                return
            room = self._tickets[place.number].find_room(scan)
            if room is not None:
                self._start(place, room)
                continue
            num_passed += 1
            if num_passed == LOOKAHEAD:
                return

    def _start(self, place: Place, room: Room) -> None:
        level = self._waiting.start(place.number)
        ticket = self._forget(place)
        ticket.level = level
        self._drain.started(ticket.num_tokens)
        self._running.add(ticket.tenant, 1)  # nobody else takes its place meanwhile
        self._running.add(ticket.tenant, ticket.start(room) - 1)

    def _drop_expired(self) -> None:
        longest_s = self.limits.max_queued_s
        for place in self._waiting.advance(self._clock()):
            if place.expires_at < place.arrived + longest_s:
                self._expire(place, DeadlineExceeded("the deadline passed before a worker was free", reason="queue"))
            else:
                hint_s = self._retry_after(self.queued_tokens)
                self._expire(place, Exhausted(f"waited {longest_s:g} s for a worker", reason="queue_full", retry_after_s=hint_s))

    def _expire(self, place: Place, error: SplitfireError) -> None:
        if place.number in self._tickets:  # not withdrawn by what the end of another brought about
            self._leave(place.number).expire(error)

    def _make_way(self, place: Place) -> list[Place]:
        """Who has to leave the queue for one that has come into it; Exhausted when that is the one."""
        if place.is_resumed:
            num_resumed = self.num_queued - self._bounds.num_queued
            if num_resumed > self.limits.max_running:
                message = f"{num_resumed - 1} answers wait already to be resumed, limit {self.limits.max_running}"
                raise Exhausted(message, reason="queue_full", retry_after_s=self._retry_after(self.queued_tokens))
            return []
        rate, most_s = self._rate, self.limits.ttft_target_s * QUEUE_PERCENT[place.priority] / 100
        most = rate * max(0.0, most_s - STARTED_S)
        if rate > 0 and self.queued_tokens > most:
            before = self._waiting.tokens_before(place.number)
            if before > most:
                waiting = f"{before:.0f} prompt tokens are before it, {before / rate + STARTED_S:.2f} s at {rate:.0f} tokens/s"
                message = f"{waiting}; its class waits at most {most_s:g} s"
                raise Exhausted(message, reason="queue_full", retry_after_s=self._retry_after(before))
        given = self._bounds.make_way(place)
        if given is None:
            hint_s = self._retry_after(self._waiting.tokens_before(place.number))
            raise Exhausted(self._bounds.why_full(place), reason="queue_full", retry_after_s=hint_s)
        return given

    @property
    def _rate(self) -> float:
        """Prompt tokens a second that can be counted on: what workers compute, or what really starts, if that is less. 0: not known."""
        rate = min(self.rate_tokens_per_s or inf, max(self._drain.tokens_per_s, 1.0))
        return rate if rate < inf else 0.0

    def _retry_after(self, num_tokens: float) -> float:
        """When so many tokens will have been computed; spread, or all who are told would come back together."""
        wait_s = num_tokens / self._rate if self._rate > 0 else UNKNOWN_WAIT_S
        seconds = wait_s * self._random.uniform(1 - RETRY_JITTER, 1 + RETRY_JITTER)
        return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)

    def _enter(self, ticket: Ticket[Scan, Room]) -> Place:
        now, number = self._clock(), self._num_arrived
        self._num_arrived += 1
        expires_at = now + self.limits.max_queued_s
        place = Place(
            number=number,
            tenant=ticket.tenant,
            weight=ticket.weight,
            priority=ticket.priority,
            is_resumed=ticket.is_resumed,
            num_tokens=ticket.num_tokens,
            num_bytes=ticket.num_bytes,
            arrived=now,
            expires_at=expires_at if ticket.deadline is None else min(expires_at, ticket.deadline),
            key=(now + AGEING * ticket.work_s, number),  # so only what comes within AGEING times its own work can pass it
        )
        ticket.number = number
        self._tickets[number] = ticket
        self._running.set_quota(ticket.tenant, ticket.max_running)
        self._waiting.add(place)
        self.queued_work_s += ticket.work_s
        if not ticket.is_resumed:
            self._bounds.add(place)
        return place

    def _leave(self, number: int) -> Ticket[Scan, Room]:
        """It does not start."""
        return self._forget(self._waiting.remove(number))

    def _forget(self, place: Place) -> Ticket[Scan, Room]:
        ticket = self._tickets.pop(place.number)
        self.queued_work_s = self.queued_work_s - ticket.work_s if self._tickets else 0.0  # no rounding is left of many
        if not place.is_resumed:
            self._bounds.remove(place)
        return ticket
