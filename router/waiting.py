"""Everything that waits, in the order in which it starts: by class, which rises with waiting; who resumes before who begins; then
fairly between tenants. Pure: a number says which ticket, the clock is a parameter.

A ticket's *level* is its class and one more for each `ageing_s` it has waited, up to interactive: system stays for the system. So
whatever arrives, a ticket of the lowest class is level with interactive ones after twice that time, and then it is the oldest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from router.fairness import FairOrder, Place

BATCH, STANDARD, INTERACTIVE, SYSTEM = 1, 2, 3, 4
CLASSES = (BATCH, STANDARD, INTERACTIVE, SYSTEM)


class Waiting:
    """Places by number. A place is in one queue, that of its level, from `add` to `remove`."""

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s
        self._places: dict[int, Place] = {}
        self._levels: dict[int, int] = {}
        self._resumed = {level: FairOrder() for level in CLASSES}
        self._new = {level: FairOrder() for level in CLASSES}
        self._timers: list[tuple[float, int]] = []  # heap: when a place rises or expires; of those removed, some are left

    @property
    def num_tokens(self) -> int:
        return sum(queue.num_tokens for queues in (self._resumed, self._new) for queue in queues.values())

    def add(self, place: Place) -> None:
        number = place.number
        self._places[number], self._levels[number] = place, place.priority
        self._queue_of(place).add(place)
        self._set_timer(place)

    def remove(self, number: int) -> Place:
        """It does not wait any more, and did not start."""
        place = self._places.pop(number)
        self._queue_of(place).remove(place)
        del self._levels[number]
        if len(self._timers) > 2 * len(self._places) + 64:
            self._timers = [timer for timer in self._timers if timer[1] in self._places]
            heapify(self._timers)
        return place

    def start(self, number: int) -> int:
        """It starts: its tenant got its prompt. The level it got it at."""
        level, queue = self._levels[number], self._queue_of(self._places[number])
        place = self.remove(number)
        queue.charge(place.tenant, place.num_tokens / place.weight)
        return level

    def level(self, number: int) -> int:
        return self._levels[number]

    def charge(self, level: int, tenant: str, tokens: float) -> None:
        """Something came out for what started at a level. It counts there alone: what a tenant gets in a higher class costs it nothing in
        a lower."""
        self._new[level].charge(tenant, tokens)

    def advance(self, now: float) -> list[Place]:
        """Lets those rise whose time has come; those that expired, which still wait."""
        expired = []
        while self._timers and self._timers[0][0] <= now:
            _, number = heappop(self._timers)
            place = self._places.get(number)
            if place is None:
                continue
            if place.expires_at <= now:
                expired.append(place)
                continue
            self._queue_of(place).remove(place)
            self._levels[number] += 1
            self._queue_of(place).add(place)
            self._set_timer(place)
        return expired

    def in_order(self, is_held: Callable[[str], bool]) -> Iterator[Place]:
        """As they start if all can, those of tenants that are `is_held` left out. What waits may change meanwhile."""
        for level in reversed(CLASSES):
            yield from self._resumed[level].in_order(is_held)
            yield from self._new[level].in_order(is_held)

    def tokens_before(self, number: int) -> float:
        """Of the tickets that start before one that waits and does not resume."""
        level = self._levels[number]
        higher = sum(self._resumed[above].num_tokens + self._new[above].num_tokens for above in CLASSES if above > level)
        return higher + self._resumed[level].num_tokens + self._new[level].tokens_before(self._places[number])

    def _queue_of(self, place: Place) -> FairOrder:
        return (self._resumed if place.is_resumed else self._new)[self._levels[place.number]]

    def _set_timer(self, place: Place) -> None:
        level, when = self._levels[place.number], place.expires_at
        if level < INTERACTIVE:
            when = min(when, place.arrived + (level - place.priority + 1) * self._ageing_s)
        heappush(self._timers, (when, place.number))
