"""What a transport offers the agent: small control frames, and payloads received into slots chosen beforehand.

Everything runs on the io thread; no method blocks. A transport delivers control frames of one peer in order; control
and payload may overtake one another. It need not notice that a peer died: that is the agent's work.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Done = Callable[[Exception | None], None]
OnControl = Callable[[memoryview], None]


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """Memory of one slot. Who has `key` may reach it from another process of this host (`Link.reach`); empty where nobody can.
    Of a slot on a device `buffer` is the twin (device_slots.py)."""

    buffer: memoryview
    key: bytes = b""


class Link(Protocol):
    """One direction to one peer."""

    def send_control(self, frame: bytes) -> None:
        """Queues a control frame."""

    def send_payload(self, tag: int, message: memoryview, done: Done) -> None:
        """Sends to the peer's receive posted with `tag`; `done` is called once the memory may be reused. An empty message says that
        the peer's slot was filled where it lies."""

    def reach(self, key: bytes) -> memoryview | None:
        """The peer's slot with this key, to be written while it is lent to us and not kept; None where it has to be sent."""

    def close(self) -> None:
        """Lets go of the peer without waiting for it."""


class Transport(Protocol):
    """One per worker. `address` is what peers connect to, opaque, exchanged through the router."""

    name: str
    version: str
    address: bytes

    @property
    def dropped(self) -> Counter[str]:
        """What it did not take, by reason."""

    def start(self, on_control: OnControl) -> None:
        """Begins to deliver control frames; call on the io thread's running loop."""

    def allocate(self, num_bytes: int) -> SlotMemory:
        """Memory for a slot, aligned to 64 bytes, registered if that helps."""

    def connect(self, address: bytes) -> Link: ...

    def receive(self, tag: int, buffer: memoryview, done: Done) -> None:
        """Posts a receive; `done` is called when a message has filled (the beginning of) the buffer."""

    def cancel(self, tag: int) -> bool:
        """Takes back a posted receive. True when it is certain that nothing will be written to its buffer any more; `done` is
        then never called."""

    def close(self) -> None: ...


def slot_tag(index: int, generation: int) -> int:
    """The payload tag of one lending of one slot: 24 bits of index, 32 of generation."""
    return (index & 0xFFFFFF) << 32 | generation & 0xFFFFFFFF


def private_memory(num_bytes: int) -> memoryview:
    """Memory of this process alone, aligned to pages and resident from the start."""
    return memoryview(mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
