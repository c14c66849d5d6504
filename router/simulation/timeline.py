"""Virtual time: what happens next, in order; ties in the order they were planned. Pure."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Timeline:
    """`now` only rises."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._count += 1
        heappush(self._planned, (max(when, self.now), self._count, act))

    def run(self) -> None:
        """Until nothing is planned any more."""
        while self._planned:
            self.now, _, act = heappop(self._planned)
            act()
