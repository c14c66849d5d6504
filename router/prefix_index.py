"""Which workers hold which prefix, by the 64-bit names of blocks. Pure; belongs to the event loop.

One dictionary leads from a name to a bit mask of workers. What a worker holds is chained and evicted leaf first, so who holds a
block holds those before it: depths are found by halving, and each look-up answers for all workers.

Fed by what workers tell (exact ones) and by what was sent to them (credit). Being wrong costs a cache miss, so it is never waited
for: a gap in what a worker tells leaves what is known in use until the resync is complete.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

CREDIT_S = 30.0  # an exact worker has told of a block by then, or will not have it
EXPIRE_EVERY_S = 1.0
SWEEP_BLOCKS = 256  # of workers that are gone, with every change and twice as many as it names
EVICT_BLOCKS = 64  # at once, so that who gives way is looked for seldom
MAX_MEMO = 1024
FEW = 8  # workers of a mask are found bit by bit
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class CacheChange:
    """One message of a worker's cache events. A name is in one of the two at most; a snapshot's pages have `stored` alone."""

    sequence: int
    stored: Sequence[int]
    removed: Sequence[int]
    is_snapshot: bool = False
    is_last_page: bool = False


@dataclass(eq=False, slots=True)
class _Worker:
    """What the index says one worker holds: the union of three sets that have nothing in common."""

    incarnation: bytes
    slot: int  # its bit
    capacity: int
    is_exact: bool
    held: set[int] = field(default_factory=set)  # told
    doubtful: set[int] = field(default_factory=set)  # told before a resync that is not complete
    credited: OrderedDict[int, float] = field(default_factory=OrderedDict)  # sent there, when; oldest leaf first
    cursor: int = 0  # sequence number of the message that comes next
    is_between: bool = True  # that message begins a snapshot, if it is of one
    in_snapshot: bool = False  # the pages so far are complete

    @property
    def num_blocks(self) -> int:
        return len(self.held) + len(self.doubtful) + len(self.credited)


class PrefixIndex:
    """Invariant: a worker's bit is set under a name exactly if the name is in one of its sets. `max_blocks` bounds the sum of all
    their sizes; about 150 bytes each."""

    def __init__(self, max_blocks: int, clock: Callable[[], float]) -> None:
        self._max_blocks = max_blocks
        self._clock = clock
        self._holders: dict[int, int] = {}
        self._workers: dict[bytes, _Worker] = {}
        self._by_slot: dict[int, _Worker] = {}  # with those that are gone, until none of their bits is left
        self._gone: list[_Worker] = []
        self._present = 0  # the bits of those that are not gone
        self._num_blocks = 0
        self._masks: dict[int, tuple[bytes, ...]] = {}  # workers of a mask
        self._partings: dict[int, int] = {}  # by first block, the depth where not all went on the last time
        self._expires_at = inf

    def add(self, worker: bytes, capacity: int, *, is_exact: bool) -> None:
        """`capacity`: blocks of its pool. Exact: it sends cache events, from sequence number 0 and beginning with a snapshot."""
        self.remove(worker)
        self._sweep(0)
        slot = next(i for i in range(len(self._by_slot) + 1) if i not in self._by_slot)
        self._workers[worker] = self._by_slot[slot] = _Worker(worker, slot, capacity, is_exact)
        self._present |= 1 << slot

    def remove(self, worker: bytes) -> None:
        """It is not found from now on; its entries go little by little."""
        gone = self._workers.pop(worker, None)
        if gone is not None:
            self._present &= ~(1 << gone.slot)
            self._masks.clear()
            gone.held |= gone.doubtful
            gone.held.update(gone.credited)
            gone.doubtful, gone.credited = set(), OrderedDict()
            self._gone.append(gone)

    def on_events(self, worker: bytes, events: CacheChange) -> bool:
        """False: something is missing before this message; ask for a resync. Once for each gap, so that it comes to an end."""
        known = self._workers.get(worker)
        if known is None or not known.is_exact or events.sequence < known.cursor:
            return True  # late or repeated
        self._sweep(2 * (len(events.stored) + len(events.removed)))
        is_gap = events.sequence > known.cursor or (known.in_snapshot and not events.is_snapshot)
        if is_gap:
            known.in_snapshot = known.is_between = False
        known.cursor = events.sequence + 1
        if events.is_snapshot and known.is_between:
            known.in_snapshot = True
            known.doubtful |= known.held
            known.held = set()
        self._forget(known, events.removed)
        self._hold(known, events.stored)
        known.is_between = events.is_last_page or not events.is_snapshot
        if known.in_snapshot and events.is_last_page:
            known.in_snapshot = False
            self._forget(known, tuple(known.doubtful))
        return not is_gap

    def credit(self, worker: bytes, names: Sequence[int]) -> None:
        """A request with these blocks was sent there, so it will soon hold them. Where no event says so they are forgotten after
        CREDIT_S; of a worker that tells nothing, when as many were used since as its pool has."""
        known = self._workers.get(worker)
        if known is None:
            return
        now = self._clock()
        self._sweep(2 * len(names))
        credited, held, doubtful = known.credited, known.held, known.doubtful
        for name in reversed(names):  # a leaf is older than what it follows
            if name in held or name in doubtful:
                break
            if name in credited:
                credited[name] = now
                credited.move_to_end(name)
            elif self._set(known, name):
                credited[name] = now
        while len(credited) > known.capacity:
            self._clear(known, credited.popitem(last=False)[0])
        if known.is_exact and credited:
            self._expires_at = min(self._expires_at, now + CREDIT_S)

    def depths(self, names: Sequence[int]) -> Mapping[bytes, int]:
        """How many leading blocks each worker holds; those that hold none are left out. Takes one look-up for a prompt that nobody
        knows, else about log2(number of names) for each depth there is; two for the first, where prompts that begin alike part."""
        if self._clock() >= self._expires_at:
            self._expire()
        found: dict[bytes, int] = {}
        holders = self._holders
        at = holders.get(names[0], 0) & self._present if names else 0
        if not at:
            return found
        depth, parting = 1, 0
        expected = self._partings.get(names[0], 0)
        right = [(len(names), holders.get(names[-1], 0) & at)]  # deeper places and who holds them, the nearest last
        for place in (expected + 1, expected):
            if 1 < place < len(names):
                right.append((place, holders.get(names[place - 1], 0) & at | right[-1][1]))
        while right:
            deeper, of_these = right[-1]
            if of_these == at:
                depth = deeper
                right.pop()
            elif deeper - depth > 1:
                middle = (depth + deeper) // 2
                # Who holds what is deeper holds this too, whatever the index lost of it.
                right.append((middle, holders.get(names[middle - 1], 0) & at | of_these))
            else:
                self._put(found, at, of_these, depth)
                parting = parting or depth
                depth, at = deeper, of_these
                right.pop()
        self._put(found, at, 0, depth)
        if parting != expected:
            _keep(self._partings, names[0], parting)
        return found

    def num_blocks(self, worker: bytes) -> int:
        known = self._workers.get(worker)
        return known.num_blocks if known is not None else 0

    # -- inside

    def _put(self, found: dict[bytes, int], at: int, deeper: int, depth: int) -> None:
        """Those of `at` are found at this depth, but for those of `deeper`, which are put later."""
        mask = at & ~deeper
        if mask.bit_count() > FEW:  # many share a system prompt: always the same ones, if the few that go deeper are left in
            found |= dict.fromkeys(self._names_of(at), depth)
            return
        while mask:
            bit = mask & -mask
            found[self._by_slot[bit.bit_length() - 1].incarnation] = depth
            mask ^= bit

    def _names_of(self, mask: int) -> tuple[bytes, ...]:
        known = self._masks.get(mask)
        if known is None:
            known = tuple(w.incarnation for slot, w in self._by_slot.items() if mask >> slot & 1)
            _keep(self._masks, mask, known)
        return known

    def _hold(self, worker: _Worker, names: Iterable[int]) -> None:
        """Told by the worker, which has no more blocks than its pool."""
        held, doubtful, credited = worker.held, worker.doubtful, worker.credited
        for name in names:
            if name in held or len(held) >= worker.capacity:
                continue
            if name in doubtful:
                doubtful.remove(name)
                held.add(name)
            elif credited.pop(name, None) is not None or self._set(worker, name):
                held.add(name)

    def _forget(self, worker: _Worker, names: Iterable[int]) -> None:
        """Not told any more. What is only credited stays: it was sent there since."""
        for name in names:
            if name in worker.held:
                worker.held.remove(name)
            elif name in worker.doubtful:
                worker.doubtful.remove(name)
            else:
                continue
            self._clear(worker, name)

    def _set(self, worker: _Worker, name: int) -> bool:
        """One entry more, which the caller puts into a set of the worker's; False when there is no room."""
        if self._num_blocks >= self._max_blocks and not self._make_room():
            return False
        bit = 1 << worker.slot
        mask = self._holders.get(name)
        self._holders[name] = bit if mask is None else mask | bit
        self._num_blocks += 1
        return True

    def _clear(self, worker: _Worker, name: int) -> None:
        """One entry less, which the caller took out of its set."""
        mask = self._holders[name] & ~(1 << worker.slot)
        if mask:
            self._holders[name] = mask
        else:
            del self._holders[name]
        self._num_blocks -= 1

    def _make_room(self) -> bool:
        """What the gone held goes first, then the oldest credits of all."""
        self._sweep(0)
        if self._num_blocks < self._max_blocks:
            return True
        oldest = min((w for w in self._workers.values() if w.credited), key=lambda w: next(iter(w.credited.values())), default=None)
        if oldest is None:
            return False
        for _ in range(min(EVICT_BLOCKS, len(oldest.credited))):
            self._clear(oldest, oldest.credited.popitem(last=False)[0])
        return True

    def _sweep(self, num_blocks: int) -> None:
        """Some entries of workers that are gone; a bit is free for another once none is left."""
        left = num_blocks + SWEEP_BLOCKS
        while self._gone and left > 0:
            worker = self._gone[-1]
            count = min(left, len(worker.held))
            for _ in range(count):
                self._clear(worker, worker.held.pop())
            left -= count
            if not worker.held:
                self._gone.pop()
                del self._by_slot[worker.slot]

    def _expire(self) -> None:
        """Credits of exact workers that no event has confirmed; the next time not before EXPIRE_EVERY_S."""
        now = self._clock()
        first = inf
        for worker in self._workers.values():
            credited = worker.credited
            while worker.is_exact and credited:
                at = next(iter(credited.values()))
                if at + CREDIT_S > now:
                    first = min(first, at)
                    break
                self._clear(worker, credited.popitem(last=False)[0])
        self._expires_at = max(first + CREDIT_S, now + EXPIRE_EVERY_S) if first < inf else inf


def _keep(memo: dict[int, Value], key: int, value: Value) -> None:
    """Remembers what is cheap to find again, so all of it may be forgotten now and then."""
    if len(memo) >= MAX_MEMO:
        memo.clear()
    memo[key] = value
