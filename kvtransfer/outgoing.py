"""All transfers that this worker sends: their machines, the send ring, and what waits for a slot of it. io thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
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

    def closed(self, outcome: Outcome, reason: str) -> None:
        self._outgoing.remove(self)
        self.source.closed(outcome, reason)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks that have a slot at the receiver and wait for one here."""

    sending: _Sending
    target: LentSlot
    piece: Piece


class Outgoing:
    """Invariant: every slot lent to us gets exactly one message, with blocks or void, unless its peer is gone."""

    def __init__(self, ring: Ring, incarnation: bytes, fingerprint: bytes, clock: Callable[[], float]) -> None:
        self.ring = ring
        self._incarnation = incarnation
        self._fingerprint = fingerprint
        self._clock = clock
        self._sendings: dict[bytes, _Sending] = {}
        self._queue: deque[_Piece] = deque()  # at most one for each slot lent to us
        self._in_flight: dict[RingSlot, Peer] = {}

    def __len__(self) -> int:
        return len(self._sendings)

    def start(self, shipment: Shipment, peer: Peer, source: Source) -> Sender:
        sending = self._sendings[shipment.transfer_id] = _Sending(self, shipment, peer, source, self._clock)
        sending.sender.offer()
        return sending.sender

    def peer_of(self, transfer_id: bytes) -> Peer | None:
        sending = self._sendings.get(transfer_id)
        return sending.peer if sending is not None else None

    def on_message(self, message: kv_pb2.KvMessage) -> None:
        self._sendings[message.transfer_id].sender.on_message(message)

    def abort_all(self, reason: str) -> None:
        for sending in list(self._sendings.values()):
            sending.sender.abort(reason)

    def peer_gone(self, peer: Peer) -> None:
        """Its transfers end without it, and the slots it may still read from are quarantined."""
        for sending in [s for s in self._sendings.values() if s.peer is peer]:
            sending.sender.abort("peer_gone", tell_peer=False)
        self._queue = deque(waiting for waiting in self._queue if waiting.sending.peer is not peer)
        for slot in [s for s, target in self._in_flight.items() if target is peer]:
            del self._in_flight[slot]
            self.ring.quarantine(slot)
        self._send_queued()

    def tick(self, now: float) -> None:
        """Ends what waits too long for the receiver."""
        for sending in list(self._sendings.values()):
            sender = sending.sender
            if sender.is_owed_an_answer and now - sender.last_progress > DEADLINES[sender.state]:
                sender.abort("deadline")

    def remove(self, sending: _Sending) -> None:
        self._sendings.pop(sending.sender.shipment.transfer_id, None)

    def fill(self, peer: Peer, target: LentSlot) -> None:
        """Fills a whole slot of a peer with nothing, to measure; from other memory when no slot is free here."""
        slot = self.ring.lend()
        buffer = slot.buffer if slot is not None else memoryview(bytearray(self.ring.slot_bytes))
        length = write_void(buffer, self._incarnation, len(buffer))
        if slot is not None:
            self._post(slot, peer, target, length, lambda _exc: None)
        else:
            peer.link.send_payload(slot_tag(target.index, target.generation), buffer, lambda _exc: None)

    def queue(self, piece: _Piece) -> None:
        self._queue.append(piece)
        self._send_queued()

    def _send_queued(self) -> None:
        while self._queue:
            if not self._queue[0].sending.sender.is_open:  # ended meanwhile: its blocks may be gone
                waiting = self._queue.popleft()
                waiting.sending.peer.void(waiting.target)
                continue
            slot = self.ring.lend()
            if slot is None:
                return
            waiting = self._queue.popleft()
            try:
                self._send(slot, waiting)
            except Exception:  # a bug, here or in a source, ends its own transfer and no other
                log.exception("transfer failed", transfer_id=waiting.sending.sender.shipment.transfer_id.hex())
                self.ring.give_back(slot)
                waiting.sending.peer.void(waiting.target)
                waiting.sending.sender.abort("internal")

    def _send(self, slot: RingSlot, waiting: _Piece) -> None:
        sending, target, piece = waiting.sending, waiting.target, waiting.piece
        sender, layout = sending.sender, sending.sender.wire_layout
        num_blocks = piece.end - piece.start
        begin, num_bytes = data_offset(num_blocks), num_blocks * layout.block_bytes
        sums = sending.source.pack(piece.start, num_blocks, layout.dtype, slot.buffer[begin : begin + num_bytes])
        header = PayloadHeader(
            fingerprint=self._fingerprint,
            transfer_id=sender.shipment.transfer_id,
            slot=target.index,
            generation=target.generation,
            cache_id=TARGET_CACHE,
            dtype=layout.dtype,
            digest_algorithm=DIGEST_SUM64,
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
        length = write_payload(slot.buffer, self._incarnation, header, bind(header, sums))
        sender.bytes_sent += num_bytes

        def sent(exc: Exception | None) -> None:
            if exc is not None:
                sender.abort("transport")

        self._post(slot, sending.peer, target, length, sent)

    def _post(self, slot: RingSlot, peer: Peer, target: LentSlot, length: int, sent: Done) -> None:
        """Sends the beginning of a send slot; `sent` unless the peer goes first."""
        self._in_flight[slot] = peer

        def completed(exc: Exception | None) -> None:
            if self._in_flight.pop(slot, None) is None:  # given up meanwhile
                return
            self.ring.give_back(slot)
            sent(exc)
            self._send_queued()

        peer.link.send_payload(slot_tag(target.index, target.generation), slot.buffer[:length], completed)
