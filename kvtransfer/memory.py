"""A transport inside one process: the public stand-in for tests, with every property the real ones promise and no more.

Frames and payloads are delivered by the event loop, in order per link. `Hub.lose(address)` makes a peer silent, as a
killed process on UCX's shared-memory path is: operations towards it never complete.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import Counter, deque
from dataclasses import dataclass, field

from kvtransfer.transport import Done, Link, OnControl, SlotMemory
from splitfire.core.errors import Unavailable


@dataclass(slots=True)
class Hub:
    """Where memory transports find each other. `is_one_memory`: a peer's slots may be written where they lie."""

    is_one_memory: bool = False
    slots: dict[bytes, memoryview] = field(default_factory=dict)  # by key
    nodes: dict[bytes, MemoryTransport] = field(default_factory=dict)
    lost: set[bytes] = field(default_factory=set)

    def create(self) -> MemoryTransport:
        transport = MemoryTransport(self, f"memory-{len(self.nodes)}".encode())
        self.nodes[transport.address] = transport
        return transport

    def lose(self, address: bytes) -> None:
        self.lost.add(address)


class MemoryTransport:
    """One node of a hub."""

    name = "memory"
    version = "1"

    def __init__(self, hub: Hub, address: bytes) -> None:
        self.address = address
        self.dropped: Counter[str] = Counter()
        self.hub = hub
        self._on_control: OnControl | None = None
        self._posted: dict[int, tuple[memoryview, Done]] = {}
        self._early: dict[int, deque[tuple[memoryview, Done]]] = {}  # payloads whose receive is not posted yet

    def start(self, on_control: OnControl) -> None:
        self._on_control = on_control

    def allocate(self, num_bytes: int) -> SlotMemory:
        buffer = memoryview(mmap.mmap(-1, num_bytes))
        if not self.hub.is_one_memory:
            return SlotMemory(buffer)
        key = f"slot-{len(self.hub.slots)}".encode()
        self.hub.slots[key] = buffer
        return SlotMemory(buffer, key)

    def connect(self, address: bytes) -> Link:
        if address not in self.hub.nodes:
            raise Unavailable("there is no such node in the hub", reason="handoff_unreachable")
        return _MemoryLink(self.hub, self.address, address)

    def receive(self, tag: int, buffer: memoryview, done: Done) -> None:
        early = self._early.get(tag)
        if early:
            message, sent = early.popleft()
            asyncio.get_running_loop().call_soon(_complete, buffer, done, message, sent)
        else:
            self._posted[tag] = (buffer, done)

    def cancel(self, tag: int) -> bool:
        return self._posted.pop(tag, None) is not None

    def close(self) -> None:
        self.hub.lose(self.address)

    def deliver_control(self, frame: bytes) -> None:
        if self._on_control is not None and self.address not in self.hub.lost:
            self._on_control(memoryview(frame))

    def deliver_payload(self, tag: int, message: memoryview, sent: Done) -> None:
        if self.address in self.hub.lost:
            return
        posted = self._posted.pop(tag, None)
        if posted is None:
            self._early.setdefault(tag, deque()).append((message, sent))
        else:
            _complete(*posted, message, sent)


class _MemoryLink:
    def __init__(self, hub: Hub, source: bytes, target: bytes) -> None:
        self._hub = hub
        self._source = source
        self._target = target

    def send_control(self, frame: bytes) -> None:
        if self._is_up():
            asyncio.get_running_loop().call_soon(self._hub.nodes[self._target].deliver_control, frame)

    def send_payload(self, tag: int, message: memoryview, done: Done) -> None:
        if self._is_up():
            asyncio.get_running_loop().call_soon(self._hub.nodes[self._target].deliver_payload, tag, message, done)

    def reach(self, key: bytes) -> memoryview | None:
        return self._hub.slots.get(key)

    def close(self) -> None:
        self._hub = Hub()

    def _is_up(self) -> bool:
        hub = self._hub
        return self._target in hub.nodes and not hub.lost & {self._source, self._target}


def _complete(buffer: memoryview, done: Done, message: memoryview, sent: Done) -> None:
    buffer[: len(message)] = message
    done(None)
    sent(None)
