"""Ring slots: fixed memory, registered once, lent for one message at a time. Pure bookkeeping over byte buffers.

A slot is FREE, LENT (a receive is posted in it, or a send reads from it), or QUARANTINED: its peer was lost while the
operation was outstanding, so the memory still belongs to the transport. A quarantined slot is never used again; a fresh
one takes its place, a bounded number of times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

MAX_QUARANTINED = 64


class SlotState(Enum):
    """The states above."""

    FREE = "free"
    LENT = "lent"
    QUARANTINED = "quarantined"


@dataclass(slots=True, eq=False)
class RingSlot:
    """`generation` is one higher each time the slot is lent, so a late message can be told."""

    index: int
    buffer: memoryview
    generation: int = 0
    state: SlotState = SlotState.FREE


class Ring:
    """Slots of one direction. `allocate(bytes)` makes their memory."""

    def __init__(self, num_slots: int, slot_bytes: int, allocate: Callable[[int], memoryview]) -> None:
        self.slot_bytes = slot_bytes
        self._allocate = allocate
        self._slots = [RingSlot(i, allocate(slot_bytes)) for i in range(num_slots)]
        self._free = deque(self._slots)
        self.num_quarantined = 0

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_lent(self) -> int:
        return sum(slot.state is SlotState.LENT for slot in self._slots)

    @property
    def is_exhausted(self) -> bool:
        """Too many peers were lost with operations outstanding: the process should drain and start anew."""
        return self.num_quarantined >= MAX_QUARANTINED

    def lend(self) -> RingSlot | None:
        """A slot with a new generation, or None: try again when one came back."""
        if not self._free:
            return None
        slot = self._free.popleft()
        slot.state = SlotState.LENT
        slot.generation += 1
        return slot

    def give_back(self, slot: RingSlot) -> None:
        """The operation on it was seen completed."""
        if slot.state is SlotState.LENT:
            slot.state = SlotState.FREE
            self._free.append(slot)

    def quarantine(self, slot: RingSlot) -> None:
        """Its operation may never complete. Replaced while the bound allows."""
        if slot.state is not SlotState.LENT:
            return
        slot.state = SlotState.QUARANTINED
        self.num_quarantined += 1
        if not self.is_exhausted:
            fresh = RingSlot(len(self._slots), self._allocate(self.slot_bytes))
            self._slots.append(fresh)
            self._free.append(fresh)
