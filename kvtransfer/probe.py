"""Measures a pair of workers when they meet: round trip, bandwidth, and what carried the bytes. Sans-IO but for counters.

The measuring side first sends plain pings, then one that asks for slots: the other side lends some, and lends each again
when its payload has arrived, as a real transfer does. `get_active_transports` of UCX lists shared memory even where TCP is used,
so the path is told by watching the network interfaces: bytes that crossed none of them went through shared memory.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvtransfer.ring import RingSlot
from kvtransfer.sender import LentSlot
from splitfire.core.machine import NETWORK, SHARED_MEMORY, UNKNOWN
from splitfire.v1 import kv_pb2

NUM_ROUND_TRIPS = 100  # enough for a 99th percentile, and 5 ms of an idle pair
NUM_PAYLOADS = 16
WINDOW = 2  # payloads on their way at once; a sender has as many slots, or it would fill memory that is cold


@dataclass(frozen=True, slots=True)
class PairRates:
    """What one measurement found."""

    round_trip_s: float  # median
    round_trip_p99_s: float
    bytes_per_s: float
    path: str  # one of machine.PATHS


class ProbeHost(Protocol):
    """The part of the agent that probing uses."""

    @property
    def send_slot_bytes(self) -> int: ...

    def now(self) -> float: ...

    def lend_probe(self, incarnation: bytes, done: Callable[[], None]) -> RingSlot | None:
        """Lends a slot of a peer's segment, with a receive posted in it, and takes it back before `done`."""


class PairMeter:
    """The measuring side: one measurement. `fill` sends a whole slot to one that was lent; `done` is called once."""

    def __init__(
        self,
        host: ProbeHost,
        send: Callable[[kv_pb2.KvMessage], None],
        fill: Callable[[LentSlot], None],
        done: Callable[[PairRates], None],
    ) -> None:
        self._host = host
        self._send = send
        self._fill = fill
        self._run = secrets.randbits(32)
        self.is_done = False
        self.num_pongs = 0
        self._done = done
        self._round_trips: list[float] = []
        self._sent_at = 0.0
        self._began = 0.0
        self._network_before: int | None = None

    def start(self) -> None:
        self._ping()

    def on_pong(self, pong: kv_pb2.Pong) -> None:
        for lent in pong.slots.slots:  # whatever run it is of: every slot lent gets a message
            self._fill(LentSlot(lent.index, lent.generation, lent.key))
        if pong.run != self._run:
            return
        self.num_pongs += 1
        if len(self._round_trips) < NUM_ROUND_TRIPS:
            self._round_trips.append(self._host.now() - self._sent_at)
            if len(self._round_trips) < NUM_ROUND_TRIPS:
                self._ping()
            else:
                self._began = self._host.now()
                self._network_before = network_bytes()
                self._send(kv_pb2.KvMessage(ping=kv_pb2.Ping(num_payloads=NUM_PAYLOADS, run=self._run)))
            return
        if pong.num_arrived == NUM_PAYLOADS and not self.is_done:
            self._finish()

    def _ping(self) -> None:
        self._sent_at = self._host.now()
        self._send(kv_pb2.KvMessage(ping=kv_pb2.Ping(sequence=len(self._round_trips), run=self._run)))

    def _finish(self) -> None:
        self.is_done = True
        moved = NUM_PAYLOADS * self._host.send_slot_bytes
        seconds = max(self._host.now() - self._began, 1e-9)
        path = path_of(moved, self._network_before, network_bytes())
        in_order = sorted(self._round_trips)
        p99 = in_order[len(in_order) * 99 // 100 - 1]
        self._done(PairRates(statistics.median(in_order), p99, moved / seconds, path))


class ProbeResponder:
    """The other side: answers pings, lends slots when it has some to spare."""

    def __init__(self, host: ProbeHost) -> None:
        self._host = host

    def on_ping(self, incarnation: bytes, send: Callable[[kv_pb2.KvMessage], None] | None, ping: kv_pb2.Ping) -> None:
        if send is None:  # a peer the router has not told us about yet; it asks again
            return
        if not ping.num_payloads:
            send(kv_pb2.KvMessage(pong=kv_pb2.Pong(sequence=ping.sequence, run=ping.run)))
            return
        run = _ProbeRun(self._host, incarnation, send, ping.run, min(ping.num_payloads, NUM_PAYLOADS))
        for _ in range(WINDOW):
            run.lend()


@dataclass(slots=True)
class _ProbeRun:
    """One measurement at the receiving side. Short of slots it ends without a result."""

    host: ProbeHost
    incarnation: bytes
    send: Callable[[kv_pb2.KvMessage], None]
    run: int
    num_payloads: int
    num_lent: int = 0
    num_arrived: int = 0

    def lend(self) -> None:
        """Tells how much has arrived and, while more is to come, lends a slot for it."""
        pong = kv_pb2.Pong(num_arrived=self.num_arrived, run=self.run)
        slot = self.host.lend_probe(self.incarnation, self._arrived) if self.num_lent < self.num_payloads else None
        if slot is not None:
            self.num_lent += 1
            pong.slots.slots.add(index=slot.index, generation=slot.generation, bytes=len(slot.buffer), key=slot.memory.key)
        self.send(kv_pb2.KvMessage(pong=pong))

    def _arrived(self) -> None:
        self.num_arrived += 1
        self.lend()


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
