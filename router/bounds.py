"""How full the queue is, and who may still come in. Pure.

A class and those below it together hold at most QUEUE_PERCENT of each bound, so a flood in one class leaves room for those above it.
When there is none, the newest ticket of the lowest class gives way to a higher one, as long as its class keeps KEPT_PERCENT of the
queue; and within a class the newest of the tenant that holds most, to one that holds less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from router.fairness import Place
from router.waiting import BATCH, CLASSES, INTERACTIVE, STANDARD, SYSTEM

QUEUE_PERCENT = {BATCH: 50, STANDARD: 80, INTERACTIVE: 95, SYSTEM: 100}
KEPT_PERCENT = 5


def part_of(bound: int, percent: int) -> int:
    """Rounded up: of a small bound, each class has something."""
    return -(-bound * percent // 100)


@dataclass(slots=True)
class _Holding:
    """What one tenant has waiting in one class."""

    weight: float
    num: int = 0
    num_bytes: int = 0


class QueueBounds:
    """What waits, by class and in the order it came."""

    def __init__(self, max_queued: int, max_queued_bytes: int) -> None:
        self.max_queued = max_queued
        self.max_queued_bytes = max_queued_bytes
        self._places: dict[int, dict[int, Place]] = {priority: {} for priority in CLASSES}
        self._holdings: dict[int, dict[str, _Holding]] = {priority: {} for priority in CLASSES}
        self._bytes = dict.fromkeys(CLASSES, 0)

    @property
    def num_queued(self) -> int:
        return sum(map(len, self._places.values()))

    @property
    def num_bytes(self) -> int:
        return sum(self._bytes.values())

    def add(self, place: Place) -> None:
        self._places[place.priority][place.number] = place
        self._bytes[place.priority] += place.num_bytes
        holding = self._holdings[place.priority].setdefault(place.tenant, _Holding(place.weight))
        holding.num += 1
        holding.num_bytes += place.num_bytes

    def remove(self, place: Place) -> None:
        del self._places[place.priority][place.number]
        self._bytes[place.priority] -= place.num_bytes
        holding = self._holdings[place.priority][place.tenant]
        holding.num -= 1
        holding.num_bytes -= place.num_bytes
        if not holding.num:
            del self._holdings[place.priority][place.tenant]

    def make_way(self, place: Place) -> list[Place] | None:
        """Who has to go so that `place`, which has been added, keeps the bounds: usually nobody. None: it is the one who goes."""
        num_over, bytes_over = self._excess(place.priority)
        given: list[Place] = []
        if num_over > 0 or bytes_over > 0:
            for other in self._givers(place):
                given.append(other)
                num_over -= 1
                bytes_over -= other.num_bytes
                if num_over <= 0 and bytes_over <= 0:
                    break
        return given if num_over <= 0 and bytes_over <= 0 else None

    def why_full(self, place: Place) -> str:
        """Of one that has been added and may not stay."""
        waiting = f"{self.num_queued - 1} requests with {self.num_bytes - place.num_bytes} bytes of token ids wait already"
        bounds = f"limits {self.max_queued} and {self.max_queued_bytes}"
        return f"{waiting}, {bounds}, of which its class has {QUEUE_PERCENT[place.priority]} %"

    def _excess(self, priority: int) -> tuple[int, int]:
        """Requests and bytes above what this class and each above it may hold together with those below."""
        num = num_bytes = 0
        num_over, bytes_over = -self.max_queued, -self.max_queued_bytes
        for each in CLASSES:
            num += len(self._places[each])
            num_bytes += self._bytes[each]
            if each >= priority:
                num_over = max(num_over, num - part_of(self.max_queued, QUEUE_PERCENT[each]))
                bytes_over = max(bytes_over, num_bytes - part_of(self.max_queued_bytes, QUEUE_PERCENT[each]))
        return num_over, bytes_over

    def _givers(self, place: Place) -> Iterator[Place]:
        num_kept = self.max_queued * KEPT_PERCENT // 100
        for lower in range(BATCH, place.priority):
            places = self._places[lower]
            yield from islice(reversed(places.values()), max(0, len(places) - num_kept))
        yield from self._of_fullest_tenant(place)

    def _of_fullest_tenant(self, place: Place) -> Iterator[Place]:
        """While even without what it gives it holds as much, for its weight, as the tenant of `place`."""
        holdings = self._holdings[place.priority]
        fullest = max(holdings, key=lambda tenant: self._size(holdings[tenant]))
        left, mine = replace(holdings[fullest]), self._size(holdings[place.tenant])
        for other in reversed(self._places[place.priority].values()):
            if other.tenant == fullest:
                left.num -= 1
                left.num_bytes -= other.num_bytes
                if self._size(left) < mine:
                    return
                yield other

    def _size(self, holding: _Holding) -> float:
        """What it takes of both bounds, over its tenant's weight."""
        share = holding.num / max(1, self.max_queued) + holding.num_bytes / max(1, self.max_queued_bytes)
        return share / holding.weight
