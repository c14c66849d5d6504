"""Which prompts may start: what is computed before decode has room for it must not fill the pool. Pure.

Prompts whose transfer is not granted hold at most half the pool together, and of that each decode worker a fair share; the first
of a decode worker may be larger than that, and where nothing is held one may be larger than half the pool. So a decode worker
without room stops its own prompts and nobody else's; and a large prompt is passed by a bounded number of small ones.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

MAX_OVERTAKEN = 32  # then those behind wait until it started


@dataclass(frozen=True, slots=True)
class Claim:
    """Blocks of one prompt that go to `peer`."""

    key: Hashable
    peer: bytes
    num_blocks: int
    priority: int


@dataclass(slots=True)
class _Waiting:
    """A claim, and how many started before it that came later or are of a lower class."""

    claim: Claim
    num_overtaken: int = 0


class HoldGate:
    """Invariant: the blocks of held claims are within the bounds above, but for what was held by force (`hold`)."""

    def __init__(self, num_blocks: int) -> None:
        self._limit = num_blocks // 2
        self._held: dict[Hashable, Claim] = {}
        self._waiting: dict[Hashable, _Waiting] = {}  # in order of arrival; bounded by the jobs a worker takes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def enter(self, claim: Claim) -> None:
        """Queues a prompt; it starts with one of the next `passing`."""
        self._waiting[claim.key] = _Waiting(claim)

    def leave(self, key: Hashable) -> None:
        """It was granted, or is over: what it holds counts no more."""
        self._held.pop(key, None)
        self._waiting.pop(key, None)

    def hold(self, claim: Claim) -> None:
        """Its hand-off is lost or goes elsewhere, its blocks are still there: it counts again, and bounds those to come."""
        waiting = self._waiting.get(claim.key)
        if waiting is not None:
            waiting.claim = claim
        else:
            self._held[claim.key] = claim

    def passing(self) -> list[Hashable]:
        """Those that may start now, higher classes first, then in order of arrival; they count as held from now on."""
        passed: list[Hashable] = []
        left: list[_Waiting] = []
        stopped: set[bytes] = set()  # decode workers of which one has been overtaken often enough
        for waiting in sorted(self._waiting.values(), key=lambda w: -w.claim.priority):
            claim = waiting.claim
            if claim.peer in stopped:
                continue
            if self._fits(claim):
                del self._waiting[claim.key]
                self._held[claim.key] = claim
                passed.append(claim.key)
                for other in left:
                    other.num_overtaken += 1
                continue
            left.append(waiting)
            if waiting.num_overtaken >= MAX_OVERTAKEN:
                if not self._held_of(claim.peer):  # it is not its own worker's prompts that it waits for
                    break
                stopped.add(claim.peer)
        return passed

    def _fits(self, claim: Claim) -> bool:
        total = sum(c.num_blocks for c in self._held.values())
        if total == 0:
            return True
        mine = self._held_of(claim.peer)
        peers = {c.peer for c in self._held.values()} | {w.claim.peer for w in self._waiting.values()}
        return total + claim.num_blocks <= self._limit and (mine == 0 or mine + claim.num_blocks <= self._limit // len(peers))

    def _held_of(self, peer: bytes) -> int:
        return sum(c.num_blocks for c in self._held.values() if c.peer == peer)
