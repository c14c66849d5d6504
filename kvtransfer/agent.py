"""The agent: one per worker, on the io thread. Joins the sans-IO machines, the rings, the peers and a transport.

It routes frames to machines, lends ring slots in turn (at most two per transfer at a time, the oldest first), keeps the
deadlines, and parks what belongs to a lost peer. It decides nothing about blocks: sources and sinks do.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from kvtransfer.frames import (
    CONTROL,
    DIGEST_SUM64,
    TARGET_CACHE,
    VOID,
    FrameError,
    PayloadHeader,
    bind,
    blocks_per_slot,
    control_frame,
    data_offset,
    parse_control,
    parse_frame,
    parse_payload,
    write_payload,
    write_void,
)
from kvtransfer.probe import PairMeter, ProbeResponder
from kvtransfer.protocol import Recv, Send
from kvtransfer.receiver import Expectation, Receiver, Sink
from kvtransfer.ring import Ring, RingSlot
from kvtransfer.sender import LentSlot, Outcome, Piece, Sender, Shipment
from kvtransfer.transport import Link, Transport, slot_tag
from splitfire.core import limits
from splitfire.core.layout import KvLayout
from splitfire.v1 import kv_pb2

log = structlog.get_logger("kvtransfer")

SLOTS_PER_TRANSFER = 2
TICK_S = 0.02
MEASURE_RETRY_S = 0.5
# How long a sender waits for the receiver's next word. A receiver that waits for blocks refuses by itself, sooner.
DEADLINES = {
    Send.OFFERED: limits.GRANT_WAIT_S,
    Send.WAITING: limits.HOLD_S,
    Send.GRANTED: limits.HOLD_S,
    Send.COMMITTED: limits.GRANT_WAIT_S,
}


class Source(Protocol):
    """The owner of the pool the blocks come from. All calls on the io thread."""

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview) -> list[int]:
        """Writes the blocks, converted, and returns the data part of each digest (kv.proto)."""

    def closed(self, outcome: Outcome, reason: str) -> None:
        """The blocks are not needed any more. The last call."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Another worker: who it is, and where its transport is reached."""

    worker_id: str
    incarnation: bytes
    address: bytes


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """Ring sizes. Memory is (send_slots + receive_slots) * slot_bytes, whatever the prompts."""

    send_slots: int
    receive_slots: int
    slot_bytes: int


@dataclass(slots=True)
class Counters:
    """What was dropped, and why; for metrics and tests."""

    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class _Peer:
    """One other worker: its link, and the machines that depend on it. Implements both ports for them."""

    def __init__(self, agent: TransferAgent, address: PeerAddress) -> None:
        self.agent = agent
        self.address = address
        self.link: Link = agent.transport.connect(address.address)
        self.meter: PairMeter | None = None

    def send(self, message: kv_pb2.KvMessage) -> None:
        self.link.send_control(control_frame(self.agent.incarnation, message))

    def blocks_per_payload(self, layout: KvLayout, receiver_slot_bytes: int) -> int:
        return blocks_per_slot(min(self.agent.options.slot_bytes, receiver_slot_bytes), layout.block_bytes)

    def send_piece(self, sender: Sender, slot: LentSlot, piece: Piece) -> None:
        self.agent.queue_send(self, sender, slot, piece)

    def send_void(self, sender: Sender, slot: LentSlot) -> None:
        self.void(slot)

    def void(self, slot: LentSlot) -> None:
        frame = memoryview(bytearray(64))
        length = write_void(frame, self.agent.incarnation)
        self.link.send_payload(slot_tag(slot.index, slot.generation), frame[:length], lambda _exc: None)

    def closed(self, sender: Sender, outcome: Outcome, reason: str) -> None:
        self.agent.sender_closed(sender, outcome, reason)

    def lend(self, receiver: Receiver) -> None:
        self.agent.lend()

    def finished(self, receiver: Receiver) -> None:
        self.agent.receiver_finished(receiver)


@dataclass(slots=True)
class _Sending:
    sender: Sender
    source: Source
    peer: _Peer


@dataclass(slots=True)
class _Receiving:
    receiver: Receiver
    peer: _Peer


@dataclass(frozen=True, slots=True)
class _ParkedOffer:
    incarnation: bytes
    message: kv_pb2.KvMessage
    since: float


class TransferAgent:
    """All hand-offs of one worker, both directions."""

    def __init__(
        self,
        transport: Transport,
        incarnation: bytes,
        fingerprint: bytes,
        options: AgentOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transport = transport
        self.incarnation = incarnation
        self.fingerprint = fingerprint[:8]
        self.options = options
        self.counters = Counters()
        self.send_ring = Ring(options.send_slots, options.slot_bytes, transport.allocate)
        self.receive_ring = Ring(options.receive_slots, options.slot_bytes, transport.allocate)
        self._clock = clock
        self._peers: dict[bytes, _Peer] = {}
        self._gone: OrderedDict[bytes, None] = OrderedDict()  # incarnations that never come back
        self._sending: dict[bytes, _Sending] = {}
        self._receiving: OrderedDict[bytes, _Receiving] = OrderedDict()  # oldest first: leftovers go to the oldest
        self._parked: OrderedDict[bytes, _ParkedOffer] = OrderedDict()
        self._posted: dict[RingSlot, _Peer] = {}
        self._queued: list[tuple[_Peer, Sender, LentSlot, Piece]] = []  # pieces that wait for a send slot
        self._responder = ProbeResponder(self)
        self._timer: asyncio.TimerHandle | None = None

    # -- what services call

    def start(self) -> None:
        self.transport.start(self._on_control)

    def close(self) -> None:
        for sending in list(self._sending.values()):
            sending.sender.abort("worker stops")
        for receiving in list(self._receiving.values()):
            receiving.receiver.close("worker stops", is_retryable=True)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.transport.close()

    @property
    def num_open(self) -> int:
        return len(self._sending) + len(self._receiving)

    @property
    def num_held_slots(self) -> int:
        return self.send_ring.num_lent + self.receive_ring.num_lent

    def offer(self, shipment: Shipment, peer: PeerAddress, source: Source) -> Sender:
        """Starts a hand-off to `peer`. The returned machine is told what gets computed, and may be aborted."""
        there = self._peer(peer)
        sender = Sender(shipment, there, self._clock)
        self._sending[shipment.transfer_id] = _Sending(sender, source, there)
        sender.offer()
        self._watch()
        return sender

    def expect(self, expectation: Expectation, peer: PeerAddress, sink: Sink) -> Receiver:
        """Gets ready for the offer of `peer`, which may have come already. Holds nothing until then."""
        there = self._peer(peer)
        receiver = Receiver(expectation, sink, there, self.options.slot_bytes, self._clock)
        self._receiving[expectation.transfer_id] = _Receiving(receiver, there)
        parked = self._parked.pop(expectation.transfer_id, None)
        if parked is not None and parked.incarnation == peer.incarnation:
            receiver.on_message(parked.message)
        self._watch()
        return receiver

    def meet(self, peer: PeerAddress) -> None:
        """Learns of a peer before any transfer, so that its pings are answered."""
        self._peer(peer)

    def measure(self, peer: PeerAddress, done: Callable[[float, float, str], None]) -> None:
        """Measures the pair; `done(round_trip_s, bytes_per_s, path)` once, unless the peer goes first or is busy."""
        there = self._peer(peer)
        there.meter = PairMeter(self, there.send, there.link, done)
        there.meter.start()
        asyncio.get_running_loop().call_later(MEASURE_RETRY_S, self._measure_again, peer, there.meter, done)

    def peer_gone(self, incarnation: bytes) -> None:
        """The peer is dead or was replaced: its transfers end now, its slots are quarantined."""
        peer = self._peers.pop(incarnation, None)
        self._gone[incarnation] = None
        while len(self._gone) > limits.MAX_WORKERS:
            self._gone.popitem(last=False)
        if peer is None:
            return
        for sending in [s for s in self._sending.values() if s.peer is peer]:
            sending.sender.abort("peer_gone", tell_peer=False)
        for receiving in [r for r in self._receiving.values() if r.peer is peer]:
            receiving.receiver.close("peer_gone", is_retryable=True, tell_peer=False)
            self._receiving.pop(receiving.receiver.expectation.transfer_id, None)
        for slot in [s for s, owner in self._posted.items() if owner is peer]:
            del self._posted[slot]
            self.receive_ring.quarantine(slot)
        peer.link.close()
        self.lend()

    def _measure_again(self, peer: PeerAddress, meter: PairMeter, done: Callable[[float, float, str], None]) -> None:
        """The peer may not have known us yet, or was busy: the measurement starts over until it has a result."""
        there = self._peers.get(peer.incarnation)
        if not meter.is_done and there is not None and there.meter is meter:
            self.measure(peer, done)

    # -- what machines call, through their peer

    def queue_send(self, peer: _Peer, sender: Sender, slot: LentSlot, piece: Piece) -> None:
        self._queued.append((peer, sender, slot, piece))
        self._send_queued()

    def lend(self) -> None:
        """Lends free slots to those who want some: two per transfer at first, what is left to the oldest."""
        for most in (SLOTS_PER_TRANSFER, self.options.receive_slots):
            for receiving in list(self._receiving.values()):
                self._lend_to(receiving, most)

    def post(self, slot: RingSlot, peer: _Peer | None, done: Callable[[RingSlot, Exception | None], None]) -> None:
        """Posts a receive for one lending of `slot`."""
        if peer is not None:
            self._posted[slot] = peer
        generation = slot.generation

        def arrived(exc: Exception | None) -> None:
            self._posted.pop(slot, None)
            if slot.generation == generation:
                done(slot, exc)

        self.transport.receive(slot_tag(slot.index, generation), slot.buffer, arrived)

    def now(self) -> float:
        return self._clock()

    def post_probe(self, slot: RingSlot, incarnation: bytes, done: Callable[[], None]) -> None:
        def arrived(slot: RingSlot, exc: Exception | None) -> None:
            self.receive_ring.give_back(slot)
            if exc is None:
                done()
            self.lend()

        self.post(slot, self._peers.get(incarnation), arrived)

    def sender_closed(self, sender: Sender, outcome: Outcome, reason: str) -> None:
        sending = self._sending.pop(sender.shipment.transfer_id, None)
        if sending is not None:
            sending.source.closed(outcome, reason)

    def receiver_finished(self, receiver: Receiver) -> None:
        self._receiving.pop(receiver.expectation.transfer_id, None)

    # -- frames

    def _on_control(self, data: memoryview) -> None:
        try:
            frame = parse_frame(data)
            if frame.kind != CONTROL:
                raise FrameError("unknown_kind")
            message = parse_control(frame.body)
        except FrameError as exc:
            self.counters.drop(exc.reason)
            return
        body = message.WhichOneof("body")
        peer = self._peers.get(frame.incarnation)
        if frame.incarnation in self._gone:
            self.counters.drop("stale_incarnation")
        elif body == "ping":
            self._responder.on_ping(frame.incarnation, peer.send if peer else None, message.ping)
        elif body == "pong":
            if peer is not None and peer.meter is not None:
                peer.meter.on_pong(message.pong)
        elif message.transfer_id in self._sending:
            self._to_owner(self._sending[message.transfer_id], frame.incarnation, message)
        elif message.transfer_id in self._receiving:
            self._to_owner(self._receiving[message.transfer_id], frame.incarnation, message)
        elif body == "offer":
            self._park(frame.incarnation, message)
        elif body == "slots" and peer is not None:  # lent before our abort got there
            for slot in message.slots.slots:
                peer.void(LentSlot(slot.index, slot.generation))
        else:
            self.counters.drop("unknown_transfer")

    def _to_owner(self, transfer: _Sending | _Receiving, incarnation: bytes, message: kv_pb2.KvMessage) -> None:
        if transfer.peer.address.incarnation != incarnation:
            self.counters.drop("not_owner")
        elif isinstance(transfer, _Sending):
            transfer.sender.on_message(message)
        else:
            transfer.receiver.on_message(message)

    def _park(self, incarnation: bytes, message: kv_pb2.KvMessage) -> None:
        """An offer may overtake the router's Submit: kept for a moment, bounded."""
        if len(self._parked) >= limits.MAX_PARKED_OFFERS:
            self._parked.popitem(last=False)
            self.counters.drop("offers_parked")
        self._parked[message.transfer_id] = _ParkedOffer(incarnation, message, self._clock())
        self._watch()

    # -- payloads

    def _lend_to(self, receiving: _Receiving, most: int) -> None:
        receiver = receiving.receiver
        lent = []
        while receiver.num_slots_wanted and len(receiver.lent) < most:
            slot = self.receive_ring.lend()
            if slot is None:
                break
            lent.append(receiver.lend_now(slot))
            self.post(slot, receiving.peer, lambda s, exc, r=receiver: self._arrived(r, s, exc))  # type: ignore[misc]
        if lent:
            message = kv_pb2.KvMessage(transfer_id=receiver.expectation.transfer_id, slots=kv_pb2.Slots(slots=lent))
            receiving.peer.send(message)

    def _arrived(self, receiver: Receiver, slot: RingSlot, exc: Exception | None) -> None:
        try:
            if exc is not None:
                raise FrameError("transport", type(exc).__name__)
            frame = parse_frame(slot.buffer)
            if frame.incarnation != receiver.expectation.incarnation:
                raise FrameError("not_owner")
            receiver.on_payload(slot, None if frame.kind == VOID else parse_payload(frame.body))
        except FrameError as error:
            self.counters.drop(error.reason)
            receiver.on_payload(slot, None)
            receiver.close(error.reason, is_retryable=True)
        self.receive_ring.give_back(slot)
        self.lend()

    def _send_queued(self) -> None:
        while self._queued:
            slot = self.send_ring.lend()
            if slot is None:
                return
            self._send_one(slot, *self._queued.pop(0))

    def _send_one(self, slot: RingSlot, peer: _Peer, sender: Sender, target: LentSlot, piece: Piece) -> None:
        """Packs and sends; a transfer that ended meanwhile sends a void in its place."""
        sending = self._sending.get(sender.shipment.transfer_id)
        if sending is None or sender.state not in (Send.GRANTED, Send.COMMITTED):
            self.send_ring.give_back(slot)
            if peer.address.incarnation in self._peers:
                peer.void(target)
            return
        layout, num_blocks = sender.wire_layout, piece.end - piece.start
        begin, num_bytes = data_offset(num_blocks), num_blocks * layout.block_bytes
        sums = sending.source.pack(piece.start, num_blocks, layout.dtype, slot.buffer[begin : begin + num_bytes])
        header = PayloadHeader(
            fingerprint=self.fingerprint, transfer_id=sender.shipment.transfer_id, slot=target.index, generation=target.generation,
            cache_id=TARGET_CACHE, dtype=layout.dtype, digest_algorithm=DIGEST_SUM64, layer_start=0, layer_end=layout.num_layers,
            head_start=0, head_end=layout.num_kv_heads, block_start=piece.start, block_end=piece.end,
            num_tokens=min(piece.end * layout.block_size, sender.shipment.num_tokens) - piece.start * layout.block_size,
            block_bytes=layout.block_bytes, payload_bytes=num_bytes,
        )  # fmt: skip
        length = write_payload(slot.buffer, self.incarnation, header, bind(header, sums))
        sender.bytes_sent += num_bytes

        def sent(exc: Exception | None) -> None:
            self.send_ring.give_back(slot)
            if exc is not None:
                sender.abort("transport")
            self._send_queued()

        peer.link.send_payload(slot_tag(target.index, target.generation), slot.buffer[:length], sent)

    # -- time

    def _watch(self) -> None:
        """Keeps a timer running while anything is open; idle costs nothing."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._clock()
        for receiving in list(self._receiving.values()):
            self._tick_receiver(receiving.receiver, now)
        for sending in list(self._sending.values()):
            sender = sending.sender
            if sender.is_owed_an_answer and now - sender.last_progress > DEADLINES[sender.state]:
                sender.abort("deadline")
        for transfer_id in [t for t, parked in self._parked.items() if now - parked.since > limits.OFFER_PARKED_S]:
            del self._parked[transfer_id]
            self.counters.drop("unknown_transfer")
        if self._sending or self._receiving or self._parked:
            self._watch()

    def _tick_receiver(self, receiver: Receiver, now: float) -> None:
        if receiver.state is Recv.WAITING:
            if now - receiver.waiting_since > limits.GRANT_WAIT_S:
                receiver.refuse("no free blocks", is_retryable=True)
            else:
                receiver.try_reserve()
        elif receiver.state is Recv.EXPECTED:
            if now - receiver.expected_at > limits.HOLD_S:
                receiver.close("no offer came", is_retryable=True, tell_peer=False)
        elif receiver.lent and now - receiver.last_progress > limits.PROGRESS_S and receiver.is_open:
            receiver.close("deadline", is_retryable=True)

    def _peer(self, address: PeerAddress) -> _Peer:
        peer = self._peers.get(address.incarnation)
        if peer is None:
            peer = self._peers[address.incarnation] = _Peer(self, address)
        return peer
