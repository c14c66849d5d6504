"""All transfers that this worker receives: their machines, the receive ring and whose turn it is, offers that came early.

io thread. A transfer gets two slots at a time, what is left goes to the oldest; so a slow one slows nobody else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from kvtransfer.frames import VOID, FrameError, parse_frame, parse_payload
from kvtransfer.peers import Peer
from kvtransfer.protocol import Recv
from kvtransfer.receiver import Expectation, Receiver, Sink
from kvtransfer.ring import Ring, RingSlot
from kvtransfer.transport import Transport, slot_tag
from splitfire.core import limits
from splitfire.v1 import kv_pb2

log = structlog.get_logger("worker")
SLOTS_PER_TRANSFER = 2
LOST_S = limits.DEAD_AFTER_S  # a receive nobody will fill


class _Receiving:
    """One transfer: its machine, and the port through which the machine acts."""

    def __init__(self, incoming: Incoming, expectation: Expectation, peer: Peer, sink: Sink, clock: Callable[[], float]) -> None:
        self.peer = peer
        self.receiver = Receiver(expectation, sink, self, incoming.ring.slot_bytes, clock)
        self._incoming = incoming

    def send(self, message: kv_pb2.KvMessage) -> None:
        self.peer.send(message)

    def lend(self) -> None:
        self._incoming.lend()

    def finished(self) -> None:
        self._incoming.remove(self)


@dataclass(frozen=True, slots=True)
class _ParkedOffer:
    """An offer that overtook the router's Submit."""

    incarnation: bytes
    message: kv_pb2.KvMessage
    since: float


@dataclass(frozen=True, slots=True)
class _Posting:
    """A receive that has not completed. `receiver` is None for one of a measurement."""

    peer: Peer | None
    receiver: Receiver | None
    since: float


class Incoming:
    """Invariant: a slot goes back to the ring only when its receive was seen completed; one of a lost peer never does."""

    def __init__(self, ring: Ring, transport: Transport, clock: Callable[[], float], drop: Callable[[str], None]) -> None:
        self.ring = ring
        self._transport = transport
        self._clock = clock
        self._drop = drop
        self._receivings: OrderedDict[bytes, _Receiving] = OrderedDict()  # oldest first
        self._parked: OrderedDict[bytes, _ParkedOffer] = OrderedDict()
        self._posted: dict[RingSlot, _Posting] = {}

    @property
    def num_posted(self) -> int:
        return len(self._posted)

    def __len__(self) -> int:
        return len(self._receivings)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def expect(self, expectation: Expectation, peer: Peer, sink: Sink) -> Receiver:
        receiving = _Receiving(self, expectation, peer, sink, self._clock)
        self._receivings[expectation.transfer_id] = receiving
        parked = self._parked.pop(expectation.transfer_id, None)
        if parked is not None and parked.incarnation == peer.address.incarnation:
            self.on_message(parked.message)
        return receiving.receiver

    def peer_of(self, transfer_id: bytes) -> Peer | None:
        receiving = self._receivings.get(transfer_id)
        return receiving.peer if receiving is not None else None

    def on_message(self, message: kv_pb2.KvMessage) -> None:
        receiver = self._receivings[message.transfer_id].receiver
        try:
            receiver.on_message(message)
        except Exception:
            self._broke(receiver)

    def park(self, incarnation: bytes, message: kv_pb2.KvMessage) -> None:
        """Kept for a moment, bounded."""
        if len(self._parked) >= limits.MAX_PARKED_OFFERS:
            self._parked.popitem(last=False)
            self._drop("offers_parked")
        self._parked[message.transfer_id] = _ParkedOffer(incarnation, message, self._clock())

    def close_all(self, reason: str) -> None:
        for receiving in list(self._receivings.values()):
            receiving.receiver.close(reason, is_retryable=True)

    def peer_gone(self, peer: Peer) -> None:
        """Its transfers end without it, and its slots are quarantined: nobody will complete their receives."""
        for transfer_id, receiving in [(t, r) for t, r in self._receivings.items() if r.peer is peer]:
            receiving.receiver.close("peer_gone", is_retryable=True, tell_peer=False)
            self._receivings.pop(transfer_id, None)
        for slot in [s for s, posting in self._posted.items() if posting.peer is peer]:
            self._give_up(slot)
        self.lend()

    def lend(self) -> None:
        """Lends free slots to those who want some: two per transfer at first, what is left to the oldest."""
        for most in (SLOTS_PER_TRANSFER, self.ring.num_slots):
            for receiving in list(self._receivings.values()):
                self._lend_to(receiving, most)

    def post(
        self, slot: RingSlot, peer: Peer | None, done: Callable[[Exception | None], None], receiver: Receiver | None = None
    ) -> None:
        """Posts a receive for this lending of `slot`; `done` unless it is given up first."""
        posting = self._posted[slot] = _Posting(peer, receiver, self._clock())

        def arrived(exc: Exception | None) -> None:
            if self._posted.get(slot) is posting:
                del self._posted[slot]
                done(exc)

        self._transport.receive(slot_tag(slot.index, slot.generation), slot.buffer, arrived)

    def tick(self, now: float) -> None:
        """Tries again for those who wait for blocks, and ends what makes no progress."""
        for receiving in list(self._receivings.values()):
            receiver = receiving.receiver
            if receiver.state is Recv.WAITING:
                if now - receiver.waiting_since > limits.GRANT_WAIT_S:
                    receiver.refuse("no free blocks", is_retryable=True)
                    continue
                try:
                    receiver.try_reserve()
                except Exception:
                    self._broke(receiver)
            elif receiver.state is Recv.EXPECTED:
                if now - receiver.expected_at > limits.HOLD_S:
                    receiver.close("no offer came", is_retryable=True, tell_peer=False)
            elif receiver.is_open and receiver.lent and now - receiver.last_progress > limits.PROGRESS_S:
                receiver.close("deadline", is_retryable=True)
        for slot, posting in list(self._posted.items()):
            is_over = posting.receiver is None or posting.receiver.state is Recv.DRAINING
            if is_over and now - posting.since > LOST_S:  # its sender gave us up, and will not fill it any more
                self._give_up(slot)
                if posting.receiver is not None:
                    posting.receiver.on_payload(slot, None)
        for transfer_id in [t for t, parked in self._parked.items() if now - parked.since > limits.OFFER_PARKED_S]:
            del self._parked[transfer_id]
            self._drop("unknown_transfer")

    def _give_up(self, slot: RingSlot) -> None:
        """Its receive may never complete, so the memory stays with the transport."""
        del self._posted[slot]
        self.ring.quarantine(slot)

    def remove(self, receiving: _Receiving) -> None:
        self._receivings.pop(receiving.receiver.expectation.transfer_id, None)

    def _lend_to(self, receiving: _Receiving, most: int) -> None:
        receiver = receiving.receiver
        lent = kv_pb2.Slots()
        while receiver.num_slots_wanted and len(receiver.lent) < most:
            slot = self.ring.lend()
            if slot is None:
                break
            lent.slots.append(receiver.lend_now(slot))
            self.post(slot, receiving.peer, lambda exc, s=slot: self._arrived(receiver, s, exc), receiver)  # type: ignore[misc]
        if lent.slots:
            receiving.peer.send(kv_pb2.KvMessage(transfer_id=receiver.expectation.transfer_id, slots=lent))

    def _arrived(self, receiver: Receiver, slot: RingSlot, exc: Exception | None) -> None:
        try:
            if exc is not None:
                raise FrameError("transport", type(exc).__name__)
            frame = parse_frame(slot.buffer)
            if frame.incarnation != receiver.expectation.incarnation:
                raise FrameError("not_owner")
            receiver.on_payload(slot, None if frame.kind == VOID else parse_payload(frame.body))
        except FrameError as error:
            self._drop(error.reason)
            receiver.on_payload(slot, None)
            receiver.close(error.reason, is_retryable=True)
        except Exception:
            self._broke(receiver)
        self.ring.give_back(slot)
        self.lend()

    def _broke(self, receiver: Receiver) -> None:
        """A bug, here or in a sink, ends its own transfer and no other."""
        log.exception("transfer failed", transfer_id=receiver.expectation.transfer_id.hex())
        receiver.close("internal", is_retryable=False)
