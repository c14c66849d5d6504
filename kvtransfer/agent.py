"""The agent: one per worker, on the io thread. Routes frames, keeps the clock, and is what services call.

What is sent is in outgoing.py, what is received in incoming.py, who there is in peers.py. The agent decides nothing about
blocks: sources and sinks do.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kvtransfer.expectation import Expectation, Sink
from kvtransfer.frames import CONTROL, FrameError, parse_control, parse_frame
from kvtransfer.incoming import Incoming
from kvtransfer.outgoing import Outgoing, Source
from kvtransfer.peers import Heard, Peer, PeerAddress, Peers
from kvtransfer.probe import PairMeter, PairRates, ProbeResponder
from kvtransfer.receiver import Receiver
from kvtransfer.ring import Ring, RingOptions, RingSlot
from kvtransfer.sender import LentSlot, Sender, Shipment
from kvtransfer.transport import Transport
from splitfire.v1 import kv_pb2

TICK_S = 0.02  # while something is received: sequences that run may need its blocks
SENDING_TICK_S = 0.2  # else only deadlines of seconds are looked at
MEASURE_RETRY_S = 0.5
ASK_FOR_MORE = ("grant", "want", "commit")  # whoever says this waits for us, perhaps for a transfer that ended
Measured = Callable[[PairRates], None]


class Handle(Protocol):
    """A call that is to come."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Handle]


def call_later(seconds: float, call: Callable[[], None]) -> Handle:
    """On the running event loop."""
    return asyncio.get_running_loop().call_later(seconds, call)


def _enough_blocks() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """Ring sizes, for each peer. Memory is at most `max_peers * (send_slots + receive_slots) * slot_bytes`, and what ring.py
    allows to be retired."""

    send_slots: int
    receive_slots: int
    slot_bytes: int
    max_peers: int = 16


class TransferAgent:
    """All hand-offs of one worker, both directions. `is_short_of_blocks` is asked whether receivers have to give some back."""

    def __init__(
        self,
        transport: Transport,
        incarnation: bytes,
        fingerprint: bytes,
        options: AgentOptions,
        clock: Callable[[], float] = time.monotonic,
        later: CallLater = call_later,
        is_short_of_blocks: Callable[[], bool] = _enough_blocks,
    ) -> None:
        self.transport = transport
        self.incarnation = incarnation
        self.fingerprint = fingerprint[:8]
        self.dropped: Counter[str] = Counter()  # frames and offers that were not taken, by reason
        sizes = (options.slot_bytes, options.max_peers)
        self.send_ring = Ring(RingOptions(options.send_slots, *sizes), transport.allocate)
        self.receive_ring = Ring(RingOptions(options.receive_slots, *sizes), transport.allocate)
        self._clock = clock
        self._later = later
        self._peers = Peers(transport, incarnation)
        self._outgoing = Outgoing(self.send_ring, incarnation, self.fingerprint, clock)
        self._incoming = Incoming(self.receive_ring, transport, clock, self._drop, is_short_of_blocks)
        self._responder = ProbeResponder(self)
        self._timer: Handle | None = None

    # -- what services call

    def start(self) -> None:
        self.transport.start(self._on_control)

    def close(self) -> None:
        self._outgoing.abort_all("worker stops")
        self._incoming.close_all("worker stops")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.transport.close()

    @property
    def num_open(self) -> int:
        return self.num_sending + self.num_receiving

    @property
    def num_sending(self) -> int:
        return len(self._outgoing)

    @property
    def num_receiving(self) -> int:
        return len(self._incoming)

    @property
    def num_held_slots(self) -> int:
        return self.send_ring.num_lent + self.receive_ring.num_lent

    @property
    def num_ring_bytes(self) -> int:
        return self.send_ring.num_bytes + self.receive_ring.num_bytes

    @property
    def is_worn_out(self) -> bool:
        """Too many slots were lost with their peers: the worker should drain and start anew."""
        return self.send_ring.is_exhausted or self.receive_ring.is_exhausted

    def offer(self, shipment: Shipment, peer: PeerAddress, source: Source) -> Sender:
        """Starts a hand-off to `peer`. The returned machine is told what gets computed, and may be aborted.
        Unavailable when the peer is gone or cannot be connected to."""
        self._watch()
        return self._outgoing.start(shipment, self._peers.get(peer), source)

    def expect(self, expectation: Expectation, peer: PeerAddress, sink: Sink) -> Receiver:
        """Gets ready for the offer of `peer`, which may have come already. Holds nothing until then.
        Unavailable when the peer is gone or cannot be connected to."""
        receiver = self._incoming.expect(expectation, self._peers.get(peer), sink)
        self._watch()
        return receiver

    def meet(self, peer: PeerAddress) -> None:
        """A router says that this peer is there, perhaps again. Unavailable when it cannot be connected to."""
        self._peers.introduce(peer)

    def measure(self, peer: PeerAddress, done: Measured) -> None:
        """Measures the pair; `done` once, unless the peer goes first. Starts over when the peer does not answer."""
        there = self._peers.get(peer)
        if there.meter is not None and not there.meter.is_done:
            return
        self._measure(there, done)

    def _measure(self, there: Peer, done: Measured) -> None:
        meter = there.meter = PairMeter(self, there.send, partial(self._outgoing.fill, there), done)
        meter.start()
        self._later(MEASURE_RETRY_S, partial(self._look_again, there, meter, 0, done))

    def _look_again(self, there: Peer, meter: PairMeter, num_pongs: int, done: Measured) -> None:
        if meter.is_done or self._peers.known(there.address.incarnation) is not there:
            return
        if meter.num_pongs == num_pongs:  # it did not know us yet, or had no slots to spare
            self._measure(there, done)
        else:
            self._later(MEASURE_RETRY_S, partial(self._look_again, there, meter, meter.num_pongs, done))

    def peer_gone(self, incarnation: bytes) -> None:
        """The peer is dead or was replaced: its transfers end now, nothing of it is accepted any more."""
        peer = self._peers.remove(incarnation)
        if peer is not None:
            self._outgoing.peer_gone(peer)
            self._incoming.peer_gone(peer)
            peer.link.close()

    # -- what probing uses

    @property
    def send_slot_bytes(self) -> int:
        return self.send_ring.slot_bytes

    def now(self) -> float:
        return self._clock()

    def lend_probe(self, incarnation: bytes, done: Callable[[], None]) -> RingSlot | None:
        peer = self._peers.known(incarnation)
        slot = self.receive_ring.lend(incarnation) if peer is not None else None
        if peer is not None and slot is not None:
            self._incoming.post(slot, peer, partial(self._probe_arrived, peer, slot, done))
            self._watch()
        return slot

    def _probe_arrived(self, peer: Peer, slot: RingSlot, done: Callable[[], None], exc: Exception | None) -> None:
        self.receive_ring.segment(peer.address.incarnation).give_back(slot)
        if exc is None:
            done()
        self._incoming.lend(peer)

    # -- frames and time

    def _on_control(self, data: memoryview) -> None:
        try:
            frame = parse_frame(data)
            if frame.kind != CONTROL:
                raise FrameError("unknown_kind")
            message = parse_control(frame.body)
            heard = self._peers.hear(frame.incarnation, frame.link, frame.sequence)
            if heard is Heard.REPEATED:
                raise FrameError("repeated")
            if heard is Heard.AFTER_A_GAP:
                self._link_broke(frame.incarnation)
            self._route(frame.incarnation, message)
        except FrameError as exc:
            self._drop(exc.reason)

    def _route(self, incarnation: bytes, message: kv_pb2.KvMessage) -> None:
        body, transfer_id = message.WhichOneof("body"), message.transfer_id
        peer = self._peers.known(incarnation)
        owner = self._outgoing.peer_of(transfer_id) or self._incoming.peer_of(transfer_id)
        if self._peers.is_gone(incarnation):
            self._drop("stale_incarnation")
        elif body == "ping":
            self._responder.on_ping(incarnation, peer.send if peer is not None else None, message.ping)
        elif body == "pong":
            if peer is not None and peer.meter is not None:
                peer.meter.on_pong(message.pong)
            elif peer is not None:
                self._void(peer, message.pong.slots)
        elif owner is not None and owner is not peer:
            self._drop("not_owner")
        elif self._outgoing.peer_of(transfer_id) is not None:
            self._outgoing.on_message(message)
        elif owner is not None:
            self._incoming.on_message(message)
        elif body == "offer":
            self._incoming.park(incarnation, message)
            self._watch()
        elif body == "slots" and peer is not None:  # lent before our abort got there
            self._void(peer, message.slots)
        else:
            self._drop("unknown_transfer")
            if body == "abort":
                self._incoming.unpark(incarnation, message)
            elif peer is not None and body in ASK_FOR_MORE:
                peer.send(kv_pb2.KvMessage(transfer_id=transfer_id, abort=kv_pb2.Abort(reason="unknown_transfer")))

    def _link_broke(self, incarnation: bytes) -> None:
        """Frames of the peer were lost: nobody knows what they said, so its transfers start anew."""
        self._drop("frames_lost")
        peer = self._peers.known(incarnation)
        if peer is not None:
            self._outgoing.abort_all("frames_lost", peer)
            self._incoming.close_all("frames_lost", peer)

    def _void(self, peer: Peer, slots: kv_pb2.Slots) -> None:
        for slot in slots.slots:
            peer.void(LentSlot(slot.index, slot.generation))

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def _watch(self) -> None:
        """Keeps a timer running while anything is open; idle costs nothing."""
        if self._timer is None:
            is_receiving = len(self._incoming) or self._incoming.num_parked or self._incoming.num_posted
            self._timer = self._later(TICK_S if is_receiving else SENDING_TICK_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self.tick()
        finally:
            if self.num_open or self._incoming.num_parked or self._incoming.num_posted or self._outgoing.num_in_flight:
                self._watch()

    def tick(self) -> None:
        """What time alone brings about."""
        now = self._clock()
        self._incoming.tick(now)
        self._outgoing.tick(now)
