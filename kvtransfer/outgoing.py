"""All transfers that this worker sends: their machines, and what waits for a send slot of its peer's segment. io thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import structlog

from kvtransfer.frames import (
    DIGEST_SUM64,
    TARGET_CACHE,
    PayloadHeader,
    bind,
    blocks_per_slot,
    data_offset,
    write_payload,
    write_void,
)
from kvtransfer.peers import Peer
from kvtransfer.protocol import Send
from kvtransfer.ring import Ring, RingSlot
from kvtransfer.sender import LentSlot, Outcome, Piece, Sender, Shipment
from kvtransfer.transport import Done, slot_tag
from splitfire.core import limits
from splitfire.core.layout import KvLayout
from splitfire.v1 import kv_pb2

log = structlog.get_logger("worker")
MAX_TRIES = 3  # of one payload, when the transport says that a send failed
LOST_S = limits.DEAD_AFTER_S  # a send that nobody will read
# How long a sender waits for the receiver's next word. A receiver that waits for blocks redirects by itself, sooner.
DEADLINES = {
    Send.OFFERED: limits.GRANT_WAIT_S,
    Send.WAITING: limits.HOLD_S,
    Send.GRANTED: limits.HOLD_S,
    Send.COMMITTED: limits.GRANT_WAIT_S,
}


class Source(Protocol):
    """The owner of the pool the blocks come from. All calls on the io thread."""

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        """Writes the blocks, converted, and returns the data part of each one's digest (kv.proto); nothing when it is off."""

    def granted(self) -> None:
        """The receiver has room for all of it."""

    def closed(self, outcome: Outcome, reason: str) -> None:
        """The transfer is over; unless it was received, the blocks may be offered to another receiver. The last call."""


class _Sending:
    """One transfer: its machine, and the port through which the machine acts."""

    def __init__(self, outgoing: Outgoing, shipment: Shipment, peer: Peer, source: Source, clock: Callable[[], float]) -> None:
        self.peer = peer
        self.source = source
        self.sender = Sender(shipment, self, clock)
        self._outgoing = outgoing

    def send(self, message: kv_pb2.KvMessage) -> None:
        self.peer.send(message)

    def blocks_per_payload(self, layout: KvLayout, receiver_slot_bytes: int) -> int:
        return blocks_per_slot(min(self._outgoing.ring.slot_bytes, receiver_slot_bytes), layout.block_bytes)

    def send_piece(self, slot: LentSlot, piece: Piece) -> None:
        self._outgoing.queue(_Piece(self, slot, piece))

    def send_void(self, slot: LentSlot) -> None:
        self.peer.void(slot)

    def granted(self) -> None:
        self.source.granted()

    def closed(self, outcome: Outcome, reason: str) -> None:
        self._outgoing.remove(self)
        self.source.closed(outcome, reason)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks that have a slot at the receiver and wait for one here."""

    sending: _Sending
    target: LentSlot
    piece: Piece


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A send that has not completed. `sender` is None for one that measures."""

    peer: Peer
    sender: Sender | None
    target: LentSlot
    message: memoryview  # empty where the peer's slot was filled in place: a send slot is lent all the same, and bounds a turn
    since: float
    num_tries: int = 1


class Outgoing:
    """Invariant: every slot lent to us gets exactly one message, with blocks or void, unless its peer is gone."""

    def __init__(self, ring: Ring, incarnation: bytes, fingerprint: bytes, clock: Callable[[], float]) -> None:
        self.ring = ring
        self._incarnation = incarnation
        self._fingerprint = fingerprint
        self._clock = clock
        self._sendings: dict[bytes, _Sending] = {}
        self._queues: dict[Peer, deque[_Piece]] = {}  # at most one for each slot the peer has lent to us
        self._in_flight: dict[RingSlot, _Flight] = {}

    def __len__(self) -> int:
        return len(self._sendings)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, shipment: Shipment, peer: Peer, source: Source) -> Sender:
        self.ring.segment(peer.address.incarnation)
        sending = self._sendings[shipment.transfer_id] = _Sending(self, shipment, peer, source, self._clock)
        sending.sender.offer()
        return sending.sender

    def peer_of(self, transfer_id: bytes) -> Peer | None:
        sending = self._sendings.get(transfer_id)
        return sending.peer if sending is not None else None

    def on_message(self, message: kv_pb2.KvMessage) -> None:
        self._sendings[message.transfer_id].sender.on_message(message)

    def abort_all(self, reason: str, peer: Peer | None = None) -> None:
        """Those to one peer, or all."""
        for sending in [s for s in self._sendings.values() if peer in (None, s.peer)]:
            sending.sender.abort(reason)

    def peer_gone(self, peer: Peer) -> None:
        """Its transfers end without it; the slots it may still read from are retired with its segment."""
        for sending in [s for s in self._sendings.values() if s.peer is peer]:
            sending.sender.abort("peer_gone", tell_peer=False)
        self._queues.pop(peer, None)
        for slot in [s for s, flight in self._in_flight.items() if flight.peer is peer]:
            del self._in_flight[slot]
        self.ring.drop(peer.address.incarnation)

    def tick(self, now: float) -> None:
        """Ends what waits too long for the receiver."""
        for sending in list(self._sendings.values()):
            sender = sending.sender
            if sender.is_open and sender.is_owed_an_answer and now - sender.last_progress > DEADLINES[sender.state]:
                sender.abort("deadline")
        for slot, flight in list(self._in_flight.items()):
            is_over = flight.sender is None or not flight.sender.is_open
            if is_over and now - flight.since > LOST_S:  # its receiver may still read it, some day
                del self._in_flight[slot]
                self.ring.segment(flight.peer.address.incarnation).retire(slot)

    def remove(self, sending: _Sending) -> None:
        self._sendings.pop(sending.sender.shipment.transfer_id, None)

    def fill(self, peer: Peer, target: LentSlot) -> None:
        """Fills a whole slot of a peer with nothing, to measure; from other memory when no slot is free here."""
        slot = self.ring.lend(peer.address.incarnation)
        message = slot.buffer if slot is not None else memoryview(bytearray(self.ring.slot_bytes))
        write_void(message, self._incarnation, len(message))
        room = peer.link.reach(target.key)
        if room is not None:
            num_bytes = min(len(room), len(message))
            room[:num_bytes] = message[:num_bytes]
            message = message[:0]
        if slot is not None:
            self._post(slot, _Flight(peer, None, target, message, self._clock()))
        else:
            peer.link.send_payload(slot_tag(target.index, target.generation), message, _ignore)

    def queue(self, piece: _Piece) -> None:
        self._queues.setdefault(piece.sending.peer, deque()).append(piece)
        self._send_queued(piece.sending.peer)

    def _send_queued(self, peer: Peer) -> None:
        queue = self._queues.get(peer)
        while queue:
            sending = queue[0].sending
            if sending.sender.state not in (Send.GRANTED, Send.COMMITTED):  # ended or revoked: the blocks may be gone
                peer.void(queue.popleft().target)
                continue
            slot = self.ring.segment(peer.address.incarnation).lend()
            if slot is None:
                return
            waiting = queue.popleft()
            try:
                self._send(slot, waiting)
            except Exception:  # a bug, here or in a source, ends its own transfer and no other
                log.exception("transfer failed", transfer_id=sending.sender.shipment.transfer_id.hex())
                self.ring.segment(peer.address.incarnation).give_back(slot)
                peer.void(waiting.target)
                sending.sender.abort("internal")

    def _send(self, slot: RingSlot, waiting: _Piece) -> None:
        sending, target, piece = waiting.sending, waiting.target, waiting.piece
        sender, layout = sending.sender, sending.sender.wire_layout
        num_blocks = piece.end - piece.start
        begin, num_bytes = data_offset(num_blocks), num_blocks * layout.block_bytes
        room = sending.peer.link.reach(target.key)
        if room is not None and len(room) < begin + num_bytes:  # it is not what the grant said
            room = None
        buffer = slot.buffer if room is None else room
        payload = buffer[begin : begin + num_bytes]
        has_digest = sender.digest_algorithm == DIGEST_SUM64
        sums = sending.source.pack(piece.start, num_blocks, layout.dtype, payload, digest=has_digest)
        header = PayloadHeader(
            fingerprint=self._fingerprint,
            transfer_id=sender.shipment.transfer_id,
            slot=target.index,
            generation=target.generation,
            cache_id=TARGET_CACHE,
            dtype=layout.dtype,
            digest_algorithm=sender.digest_algorithm,
            layer_start=0,
            layer_end=layout.num_layers,
            head_start=0,
            head_end=layout.num_kv_heads,
            block_start=piece.start,
            block_end=piece.end,
            num_tokens=min(piece.end * layout.block_size, sender.shipment.num_tokens) - piece.start * layout.block_size,
            block_bytes=layout.block_bytes,
            payload_bytes=num_bytes,
        )
        length = write_payload(buffer, self._incarnation, header, bind(header, sums))
        sender.bytes_sent += num_bytes
        message = buffer[:length] if room is None else slot.buffer[:0]
        self._post(slot, _Flight(sending.peer, sender, target, message, self._clock()))

    def _post(self, slot: RingSlot, flight: _Flight) -> None:
        self._in_flight[slot] = flight
        sent: Done = partial(self._sent, slot, flight)
        tag = slot_tag(flight.target.index, flight.target.generation)
        flight.peer.link.send_payload(tag, flight.message, sent)

    def _sent(self, slot: RingSlot, flight: _Flight, exc: Exception | None) -> None:
        if self._in_flight.get(slot) is not flight:  # the peer was lost meanwhile
            return
        sender = flight.sender
        if exc is not None and sender is not None and sender.is_open and flight.num_tries < MAX_TRIES:
            self._post(slot, replace(flight, num_tries=flight.num_tries + 1))  # its receive is still posted
            return
        del self._in_flight[slot]
        self.ring.segment(flight.peer.address.incarnation).give_back(slot)
        if sender is not None:
            if exc is None:
                sender.progressed()
            else:
                sender.abort("transport")
        self._send_queued(flight.peer)


def _ignore(_exc: Exception | None) -> None:
    """What only measured needs no answer."""
