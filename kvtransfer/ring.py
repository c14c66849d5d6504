"""Ring slots: fixed memory, registered once, lent for one message at a time. Pure bookkeeping over byte buffers.

Each peer and direction has a segment of its own, so a peer that is slow or dead holds up nobody else. A slot is FREE, LENT
(a receive is posted in it, or a send reads from it), or RETIRED: its operation may never complete, so the memory belongs to
the transport for good and is never used again. Retired slots are replaced, a bounded number of times; the free ones of a
lost peer serve the next. Memory is bounded by settings, whatever the prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvtransfer.transport import SlotMemory
from splitfire.core.errors import Unavailable

MAX_RETIRED = 64  # of one direction; then the process should drain and start anew


class SlotState(Enum):
    """The states above."""

    FREE = "free"
    LENT = "lent"
    RETIRED = "retired"


@dataclass(slots=True, eq=False)
class RingSlot:
    """`index` is unique in its direction; `generation` is one higher each time the slot is lent, so a late message can be told.
    On the wire it has 32 bits, and begins anew after them."""

    index: int
    memory: SlotMemory
    generation: int = 0
    state: SlotState = SlotState.FREE

    @property
    def buffer(self) -> memoryview:
        return self.memory.buffer


@dataclass(frozen=True, slots=True)
class RingOptions:
    """Memory of one direction is at most `(max_peers * slots_per_peer + MAX_RETIRED) * slot_bytes`."""

    slots_per_peer: int
    slot_bytes: int
    max_peers: int


class Ring:
    """The slots of one direction, in a segment for each peer."""

    def __init__(self, options: RingOptions, allocate: Callable[[int], SlotMemory]) -> None:
        self.options = options
        self._allocate = allocate
        self._segments: dict[bytes, Segment] = {}
        self._spare: deque[RingSlot] = deque()
        self._num_made = 0
        self.num_retired = 0

    @property
    def slot_bytes(self) -> int:
        return self.options.slot_bytes

    @property
    def num_lent(self) -> int:
        return sum(segment.num_lent for segment in self._segments.values())

    @property
    def num_bytes(self) -> int:
        """Memory taken so far, retired slots included."""
        return self._num_made * self.slot_bytes

    def counts(self) -> dict[SlotState, int]:
        """Slots by state; the sum is all that were made."""
        lent, retired = self.num_lent, self.num_retired
        return {SlotState.FREE: self._num_made - lent - retired, SlotState.LENT: lent, SlotState.RETIRED: retired}

    @property
    def is_exhausted(self) -> bool:
        """Too many operations were lost: the process should drain and start anew."""
        return self.num_retired >= MAX_RETIRED

    def segment(self, peer: bytes) -> Segment:
        """The slots of `peer`, made on first use. Unavailable when there are too many peers."""
        segment = self._segments.get(peer)
        if segment is None:
            if len(self._segments) >= self.options.max_peers:
                message = f"{len(self._segments)} peers have slots already, limit --max-peers {self.options.max_peers}"
                raise Unavailable(message, reason="handoff_too_many_peers")
            segment = self._segments[peer] = Segment(self, [self.make() for _ in range(self.options.slots_per_peer)])
        return segment

    def lend(self, peer: bytes) -> RingSlot | None:
        """A slot of `peer`; None where none is free, or its segment would be one too many."""
        try:
            return self.segment(peer).lend()
        except Unavailable:
            return None

    def drop(self, peer: bytes) -> None:
        """The peer is lost: what is lent to it is retired, what is free serves the next peer."""
        segment = self._segments.pop(peer, None)
        if segment is not None:
            self._spare.extend(segment.close())

    def make(self) -> RingSlot:
        """A slot for a segment: a lost peer's, or a new one."""
        if self._spare:
            return self._spare.popleft()
        slot = RingSlot(self._num_made, self._allocate(self.slot_bytes))
        self._num_made += 1
        return slot


class Segment:
    """The slots of one peer. Invariant: each is in exactly one of free and lent, or was retired."""

    def __init__(self, ring: Ring, slots: list[RingSlot]) -> None:
        self._ring = ring
        self._free = deque(slots)
        self._lent: set[RingSlot] = set()

    @property
    def num_slots(self) -> int:
        return len(self._free) + len(self._lent)

    @property
    def num_lent(self) -> int:
        return len(self._lent)

    def lend(self) -> RingSlot | None:
        """A slot with a new generation, or None: try again when one came back."""
        if not self._free:
            return None
        slot = self._free.popleft()
        slot.state = SlotState.LENT
        slot.generation = (slot.generation + 1) % (1 << 32)
        self._lent.add(slot)
        return slot

    def give_back(self, slot: RingSlot) -> None:
        """The operation on it was seen completed. Late news of a slot that was retired changes nothing."""
        if slot in self._lent:
            self._lent.remove(slot)
            slot.state = SlotState.FREE
            self._free.append(slot)

    def retire(self, slot: RingSlot) -> None:
        """Its operation may never complete. Another takes its place, while the bound allows."""
        if slot in self._lent:
            self._retire(slot)
            if not self._ring.is_exhausted:
                self._free.append(self._ring.make())

    def close(self) -> list[RingSlot]:
        """Nobody uses the segment any more; the slots that may be used again."""
        for slot in list(self._lent):
            self._retire(slot)
        free, self._free = self._free, deque()
        return list(free)

    def _retire(self, slot: RingSlot) -> None:
        self._lent.remove(slot)
        slot.state = SlotState.RETIRED
        self._ring.num_retired += 1
