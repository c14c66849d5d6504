"""All transfers that this worker receives: their machines, whose turn it is for blocks and for slots, early offers. io thread.

Blocks are granted by rank, then age; a smaller transfer may go first until the one before it has waited OVERTAKE_S. Slots
are of the peer's own segment: two a transfer at first, what is left to the oldest; so a slow transfer slows nobody else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from kvtransfer.expectation import Expectation, Sink
from kvtransfer.frames import VOID, FrameError, parse_frame, parse_payload
from kvtransfer.peers import Peer
from kvtransfer.protocol import NO_ROOM, Recv
from kvtransfer.receiver import Receiver
from kvtransfer.ring import Ring, RingSlot
from kvtransfer.transport import Done, Transport, slot_tag
from splitfire.core import limits
from splitfire.v1 import kv_pb2

log = structlog.get_logger("worker")
SLOTS_PER_TRANSFER = 2
OVERTAKE_S = 1.0
MAX_REVOKES = 3  # of one transfer: then running sequences have to make room instead
LOST_S = limits.DEAD_AFTER_S  # a receive nobody will fill


class _Receiving:
    """One transfer: its machine, and the port through which the machine acts."""

    def __init__(self, incoming: Incoming, expectation: Expectation, peer: Peer, sink: Sink, clock: Callable[[], float]) -> None:
        self.peer = peer
        self.receiver = Receiver(expectation, sink, self, incoming.ring.slot_bytes, clock)
        self._incoming = incoming

    def send(self, message: kv_pb2.KvMessage) -> None:
        self.peer.send(message)

    def ask_room(self) -> None:
        self._incoming.grant()

    def lend(self) -> None:
        self._incoming.lend(self.peer)

    def finished(self) -> None:
        self._incoming.remove(self)


@dataclass(frozen=True, slots=True)
class _ParkedOffer:
    """An offer that overtook the router's Submit."""

    incarnation: bytes
    message: kv_pb2.KvMessage
    since: float


@dataclass(frozen=True, slots=True, eq=False)
class _Posting:
    """A receive that has not completed. `receiver` is None for one of a measurement."""

    peer: Peer
    receiver: Receiver | None
    done: Done
    since: float


class Incoming:
    """Invariant: a slot goes back to its segment only when its receive was seen completed or cancelled; else it is retired."""

    def __init__(
        self,
        ring: Ring,
        transport: Transport,
        clock: Callable[[], float],
        drop: Callable[[str], None],
        is_short_of_blocks: Callable[[], bool],
    ) -> None:
        self.ring = ring
        self._transport = transport
        self._clock = clock
        self._drop = drop
        self._is_short_of_blocks = is_short_of_blocks
        self._receivings: OrderedDict[bytes, _Receiving] = OrderedDict()  # oldest first
        self._parked: OrderedDict[bytes, _ParkedOffer] = OrderedDict()
        self._posted: dict[RingSlot, _Posting] = {}

    def __len__(self) -> int:
        return len(self._receivings)

    @property
    def num_posted(self) -> int:
        return len(self._posted)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    # -- transfers

    def expect(self, expectation: Expectation, peer: Peer, sink: Sink) -> Receiver:
        self.ring.segment(peer.address.incarnation)
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

    def unpark(self, incarnation: bytes, abort: kv_pb2.KvMessage) -> None:
        """The sender gave up before the router's Submit got here: what is expected then ends at once."""
        parked = self._parked.get(abort.transfer_id)
        if parked is not None and parked.incarnation == incarnation:
            self._parked[abort.transfer_id] = _ParkedOffer(incarnation, abort, parked.since)

    def close_all(self, reason: str, peer: Peer | None = None) -> None:
        """Those from one peer, or all."""
        for receiving in [r for r in self._receivings.values() if peer in (None, r.peer)]:
            self._close(receiving.receiver, reason)

    def peer_gone(self, peer: Peer) -> None:
        """Its transfers end without it; slots whose receives cannot be cancelled are retired with its segment."""
        for transfer_id, receiving in [(t, r) for t, r in self._receivings.items() if r.peer is peer]:
            self._close(receiving.receiver, "peer_gone", tell_peer=False)
            self._receivings.pop(transfer_id, None)
        for slot in [s for s, posting in self._posted.items() if posting.peer is peer]:
            del self._posted[slot]
            if self._transport.cancel(slot_tag(slot.index, slot.generation)):
                self.ring.segment(peer.address.incarnation).give_back(slot)
        self.ring.drop(peer.address.incarnation)

    def remove(self, receiving: _Receiving) -> None:
        self._receivings.pop(receiving.receiver.expectation.transfer_id, None)

    def tick(self, now: float) -> None:
        """Makes room for running sequences, tries again for those who wait, and ends what makes no progress."""
        self._make_room()
        self.grant()
        for receiving in list(self._receivings.values()):
            receiver = receiving.receiver
            if receiver.state is Recv.WAITING and now - receiver.waiting_since > limits.GRANT_WAIT_S:
                receiver.redirect(NO_ROOM)
            elif receiver.state is Recv.EXPECTED and now - receiver.began > limits.MAX_DEADLINE_S:  # holds nothing
                self._close(receiver, "no offer came", tell_peer=False)
            elif receiver.is_owed_a_word and now - receiver.last_progress > limits.PROGRESS_S:
                self._close(receiver, "deadline")
        for slot, posting in list(self._posted.items()):
            is_over = posting.receiver is None or posting.receiver.state is Recv.DRAINING
            if is_over and now - posting.since > LOST_S:  # its sender gave us up, and will not fill it any more
                self._give_up(slot)
                if posting.receiver is not None:
                    posting.receiver.on_payload(slot, None)
        for transfer_id in [t for t, parked in self._parked.items() if now - parked.since > limits.OFFER_PARKED_S]:
            del self._parked[transfer_id]
            self._drop("unknown_transfer")

    # -- blocks

    def grant(self) -> None:
        """Reserves for those who wait, in order, as far as there is room."""
        now = self._clock()
        waiting = [r.receiver for r in self._receivings.values() if r.receiver.is_short]
        has_turn = True
        for receiver in sorted(waiting, key=lambda r: (-r.expectation.rank, r.began)):
            if not has_turn:
                receiver.wait()
                continue
            try:
                receiver.try_reserve()
            except Exception:
                self._broke(receiver)
            has_turn = not (receiver.is_short and now - receiver.waiting_since > OVERTAKE_S)

    def _make_room(self) -> None:
        """Running sequences come first: the newest of the lowest rank gives its blocks back, and gets its turn again."""
        while self._is_short_of_blocks():
            holders = [r.receiver for r in self._receivings.values() if r.receiver.state in (Recv.GRANTED, Recv.COMMITTED)]
            holders = [r for r in holders if r.num_revoked < MAX_REVOKES]
            if not holders:
                return
            min(holders, key=lambda r: (r.expectation.rank, -r.began)).revoke(NO_ROOM)

    # -- slots

    def lend(self, peer: Peer) -> None:
        """Lends free slots of a peer's segment: two per transfer at first, what is left to the oldest."""
        segment = self.ring.segment(peer.address.incarnation)
        mine = [r for r in self._receivings.values() if r.peer is peer and r.receiver.num_slots_wanted]
        for most in (SLOTS_PER_TRANSFER, segment.num_slots):
            for receiving in mine:
                self._lend_to(receiving, most)

    def post(self, slot: RingSlot, peer: Peer, done: Done, receiver: Receiver | None = None) -> None:
        """Posts a receive for this lending of `slot`; `done` unless it is given up first."""
        posting = self._posted[slot] = _Posting(peer, receiver, done, self._clock())
        self._transport.receive(slot_tag(slot.index, slot.generation), slot.buffer, partial(self._arrived, slot, posting))

    def _arrived(self, slot: RingSlot, posting: _Posting, exc: Exception | None) -> None:
        if self._posted.get(slot) is posting:
            del self._posted[slot]
            posting.done(exc)

    def _give_up(self, slot: RingSlot) -> None:
        """Nothing will come any more. Where that is not certain the memory stays with the transport."""
        posting = self._posted.pop(slot)
        segment = self.ring.segment(posting.peer.address.incarnation)
        if self._transport.cancel(slot_tag(slot.index, slot.generation)):
            segment.give_back(slot)
        else:
            segment.retire(slot)

    def _lend_to(self, receiving: _Receiving, most: int) -> None:
        receiver, peer = receiving.receiver, receiving.peer
        segment = self.ring.segment(peer.address.incarnation)
        lent = kv_pb2.Slots()
        while receiver.num_slots_wanted and len(receiver.lent) < most:
            slot = segment.lend()
            if slot is None:
                break
            lent.slots.append(receiver.lend_now(slot))
            self.post(slot, peer, partial(self._received, receiving, slot), receiver)
        if lent.slots:
            peer.send(kv_pb2.KvMessage(transfer_id=receiver.expectation.transfer_id, slots=lent))

    def _received(self, receiving: _Receiving, slot: RingSlot, exc: Exception | None) -> None:
        receiver, peer = receiving.receiver, receiving.peer
        try:
            if exc is not None:
                raise FrameError("transport", type(exc).__name__)
            frame = parse_frame(slot.buffer)
            if frame.incarnation != receiver.expectation.incarnation:
                raise FrameError("not_owner")
            receiver.on_payload(slot, None if frame.kind == VOID else parse_payload(frame.body))
        except FrameError as error:
            self._drop(error.reason)
            self._close(receiver, error.reason)
            receiver.on_payload(slot, None)
        except Exception:
            self._broke(receiver)
        self.ring.segment(peer.address.incarnation).give_back(slot)
        self.lend(peer)

    def _close(self, receiver: Receiver, reason: str, *, is_retryable: bool = True, tell_peer: bool = True) -> None:
        """A sink that fails at its end keeps nobody else from theirs."""
        try:
            receiver.close(reason, is_retryable=is_retryable, tell_peer=tell_peer)
        except Exception:
            log.exception("transfer failed", transfer_id=receiver.expectation.transfer_id.hex())

    def _broke(self, receiver: Receiver) -> None:
        """A bug, here or in a sink, ends its own transfer and no other."""
        log.exception("transfer failed", transfer_id=receiver.expectation.transfer_id.hex())
        self._close(receiver, "internal", is_retryable=False)
