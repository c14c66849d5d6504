"""Measures a pair of workers when they meet: round trip, bandwidth, and what carried the bytes. Sans-IO but for counters.

The measuring side sends pings; a ping that names payload bytes is answered with a lent slot, the payload is sent into it,
and its arrival is answered with another pong. `get_active_transports` of UCX lists shared memory even where TCP is used,
so the path is told by watching the network interfaces: bytes that crossed none of them went through shared memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvtransfer.frames import write_void
from kvtransfer.ring import Ring, RingSlot
from kvtransfer.transport import Link, slot_tag
from splitfire.v1 import kv_pb2

NUM_ROUND_TRIPS = 15
NUM_PAYLOADS = 32
WINDOW = 4  # payloads on their way at once
SHARED_MEMORY, NETWORK, UNKNOWN = "shared memory", "network", "unknown"


class ProbeHost(Protocol):
    """The part of the agent that probing uses."""

    incarnation: bytes
    send_ring: Ring
    receive_ring: Ring

    def now(self) -> float: ...

    def post_probe(self, slot: RingSlot, incarnation: bytes, done: Callable[[], None]) -> None:
        """Posts a receive in a lent slot and gives the slot back when it has completed."""


class PairMeter:
    """The measuring side: one measurement. `done(round_trip_s, bytes_per_s, path)` is called once."""

    def __init__(
        self, host: ProbeHost, send: Callable[[kv_pb2.KvMessage], None], link: Link, done: Callable[[float, float, str], None]
    ) -> None:
        self._host = host
        self._send = send
        self._link = link
        self._done = done
        self._round_trips: list[float] = []
        self._sent_at = 0.0
        self._num_asked = 0
        self._num_arrived = 0
        self._began = 0.0
        self._network_before: int | None = None

    def start(self) -> None:
        self._ping()

    def on_pong(self, pong: kv_pb2.Pong) -> None:
        if len(self._round_trips) < NUM_ROUND_TRIPS:
            self._round_trips.append(self._host.now() - self._sent_at)
            if len(self._round_trips) < NUM_ROUND_TRIPS:
                self._ping()
            else:
                self._began = self._host.now()
                self._network_before = network_bytes()
                for _ in range(WINDOW):
                    self._ask()
        elif pong.slots.slots:
            for lent in pong.slots.slots:
                self._fill(slot_tag(lent.index, lent.generation))
        else:
            self._num_arrived += 1
            if self._num_arrived == NUM_PAYLOADS:
                self._finish()
            else:
                self._ask()

    def _ping(self) -> None:
        self._sent_at = self._host.now()
        self._send(kv_pb2.KvMessage(ping=kv_pb2.Ping(sequence=len(self._round_trips))))

    def _ask(self) -> None:
        if self._num_asked < NUM_PAYLOADS:
            self._num_asked += 1
            ping = kv_pb2.Ping(sequence=self._num_asked, payload_bytes=self._host.send_ring.slot_bytes)
            self._send(kv_pb2.KvMessage(ping=ping))

    def _fill(self, tag: int) -> None:
        slot = self._host.send_ring.lend()
        buffer = slot.buffer if slot is not None else memoryview(bytearray(self._host.send_ring.slot_bytes))
        write_void(buffer, self._host.incarnation, len(buffer))

        def sent(_exc: Exception | None) -> None:
            if slot is not None:
                self._host.send_ring.give_back(slot)

        self._link.send_payload(tag, buffer, sent)

    def _finish(self) -> None:
        moved = NUM_PAYLOADS * self._host.send_ring.slot_bytes
        seconds = max(self._host.now() - self._began, 1e-9)
        self._done(statistics.median(self._round_trips), moved / seconds, path_of(moved, self._network_before, network_bytes()))


class ProbeResponder:
    """The other side: answers pings, lends slots when it has some to spare."""

    def __init__(self, host: ProbeHost) -> None:
        self._host = host

    def on_ping(self, incarnation: bytes, send: Callable[[kv_pb2.KvMessage], None] | None, ping: kv_pb2.Ping) -> None:
        if send is None:  # a peer the router has not told us about
            return
        if not ping.payload_bytes:
            send(kv_pb2.KvMessage(pong=kv_pb2.Pong(sequence=ping.sequence)))
            return
        slot = self._host.receive_ring.lend()
        if slot is None:  # busy with real transfers: the measurement ends without a result
            return
        arrival = kv_pb2.KvMessage(pong=kv_pb2.Pong(sequence=ping.sequence))
        self._host.post_probe(slot, incarnation, lambda: send(arrival))
        lent = kv_pb2.Slot(index=slot.index, generation=slot.generation, bytes=len(slot.buffer))
        send(kv_pb2.KvMessage(pong=kv_pb2.Pong(sequence=ping.sequence, slots=kv_pb2.Slots(slots=[lent]))))


def network_bytes() -> int | None:
    """Bytes received by all network interfaces of this network namespace so far; None where the kernel does not tell."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()[2:]
        return sum(int(line.split(":")[1].split()[0]) for line in lines)
    except (OSError, IndexError, ValueError):
        return None


def path_of(moved: int, before: int | None, after: int | None) -> str:
    """What carried `moved` bytes, by the interfaces' counters around them."""
    if before is None or after is None:
        return UNKNOWN
    return NETWORK if after - before > moved // 2 else SHARED_MEMORY
