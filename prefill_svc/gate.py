"""Which prompts may start: what is computed before decode has room for it must not fill the pool. Pure.

Prompts whose transfer is not granted hold at most half the pool together, and of that each decode worker a fair share; one
prompt may always start where none is held. So a decode worker without room stops its own prompts and nobody else's.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """Blocks of one prompt that go to `peer`."""

    key: Hashable
    peer: bytes
    num_blocks: int
    priority: int


class HoldGate:
    """Invariant: the blocks of held claims are within the bounds above."""

    def __init__(self, num_blocks: int) -> None:
        self._limit = num_blocks // 2
        self._held: dict[Hashable, Claim] = {}
        self._waiting: dict[Hashable, Claim] = {}  # in order of arrival; bounded by the jobs a worker takes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def enter(self, claim: Claim) -> None:
        """Queues a prompt; it starts with one of the next `passing`."""
        self._waiting[claim.key] = claim

    def leave(self, key: Hashable) -> None:
        """It was granted, or is over: what it holds counts no more."""
        self._held.pop(key, None)
        self._waiting.pop(key, None)

    def hold(self, claim: Claim) -> None:
        """Its hand-off is lost or goes elsewhere, its blocks are still there: it counts again, and bounds those to come."""
        (self._waiting if claim.key in self._waiting else self._held)[claim.key] = claim

    def passing(self) -> list[Hashable]:
        """Those that may start now, higher classes first, then in order of arrival; they count as held from now on."""
        passed: list[Hashable] = []
        for claim in sorted(self._waiting.values(), key=lambda c: -c.priority):
            if self._fits(claim):
                del self._waiting[claim.key]
                self._held[claim.key] = claim
                passed.append(claim.key)
        return passed

    def _fits(self, claim: Claim) -> bool:
        claims = [*self._held.values(), *self._waiting.values()]
        share = self._limit // max(1, len({c.peer for c in claims}))
        total = sum(c.num_blocks for c in self._held.values())
        mine = sum(c.num_blocks for c in self._held.values() if c.peer == claim.peer)
        if mine == 0:  # also one larger than a share goes, alone
            return total == 0 or total + min(claim.num_blocks, share) <= self._limit
        return mine + claim.num_blocks <= share and total + claim.num_blocks <= self._limit
