"""Who may start, who waits, who is refused. Pure: tickets in order of class and arrival, and the bounds of the queue.

Requests wait here, not at the workers: a ticket is handed out only when placement finds somebody whose own queue is at
most one chunk long. Overload is refused at once, with a hint; what has waited too long is refused rather than served late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from splitfire.core.errors import Exhausted

Room = TypeVar("Room")


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds; a request counts as `max_bytes` does until it starts."""

    max_running: int
    max_queued: int
    max_queued_bytes: int
    max_queued_s: float


@dataclass(eq=False, slots=True)
class Ticket(Generic[Room]):
    """One choice of a request, or all of them, that want to start. `start` is called with the room they got and returns how many
    start with it, `expire` when they may not."""

    priority: int
    num_bytes: int
    find_room: Callable[[], Room | None]
    start: Callable[[Room], int]
    expire: Callable[[Exhausted], None]
    arrived: float = 0.0
    order: int = field(default=0)


class Admission(Generic[Room]):
    """Counts what runs and what waits. Every change calls `pump`."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.num_running = 0
        self._clock = clock
        self._queue: list[Ticket[Room]] = []
        self._queued_bytes = 0
        self._order = 0

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def request(self, ticket: Ticket[Room]) -> None:
        """Starts the ticket now, or queues it; Exhausted when the queue is full."""
        ticket.arrived, ticket.order = self._clock(), self._order
        self._order += 1
        at = len(self._queue)
        while at and self._queue[at - 1].priority < ticket.priority:
            at -= 1
        self._queue.insert(at, ticket)
        self._queued_bytes += ticket.num_bytes
        self.pump()
        is_over = self.num_queued > self.limits.max_queued or self._queued_bytes > self.limits.max_queued_bytes
        if is_over and ticket in self._queue:
            self.withdraw(ticket)
            waiting = f"{self.num_queued} requests with {self._queued_bytes} bytes of token ids wait already"
            bounds = f"limits {self.limits.max_queued} and {self.limits.max_queued_bytes}"
            raise Exhausted(f"{waiting}, {bounds}", reason="queue_full", retry_after_s=1.0)

    def withdraw(self, ticket: Ticket[Room]) -> None:
        """The request does not want to start any more; harmless when it has."""
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._queued_bytes -= ticket.num_bytes

    def ended(self) -> None:
        """Something that was started is over."""
        self.num_running -= 1
        self.pump()

    def pump(self) -> None:
        """Starts what can start, highest class first and oldest first within it; drops what has waited too long."""
        now = self._clock()
        for ticket in [t for t in self._queue if now - t.arrived > self.limits.max_queued_s]:
            self.withdraw(ticket)
            ticket.expire(Exhausted(f"waited {self.limits.max_queued_s:g} s for a worker", reason="queue_full", retry_after_s=5.0))
        while self._queue and self.num_running < self.limits.max_running:
            ticket = self._queue[0]
            room = ticket.find_room()
            if room is None:
                return
            self.withdraw(ticket)
            self.num_running += 1  # nobody else takes its place meanwhile
            self.num_running += ticket.start(room) - 1
