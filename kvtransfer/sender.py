"""The sending machine of one hand-off. Sans-IO: it talks through a `SenderPort` and never waits.

Invariants: a piece is packed only while GRANTED and only from blocks that are computed; every slot ever lent to this
transfer is filled exactly once, with a piece or with a void; the commit is sent after the last piece was posted. The
blocks stay until `closed`, so what was revoked can be sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvtransfer.frames import DIGESTS
from kvtransfer.protocol import SENDER, Send, SendEvent
from splitfire.core.layout import KvLayout
from splitfire.core.lifecycle import IllegalTransition, advance
from splitfire.core.wire import layout_from_wire, layout_to_wire
from splitfire.v1 import kv_pb2


class Outcome(Enum):
    """How a transfer ended, for the owner of its blocks."""

    RECEIVED = "received"
    REFUSED = "refused"
    REDIRECTED = "redirected"
    ABORTED = "aborted"
    ABORTED_BY_PEER = "aborted by peer"


@dataclass(frozen=True, slots=True)
class Piece:
    """Logical blocks [start, end), sent in one payload."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LentSlot:
    """A slot of the receiver's ring."""

    index: int
    generation: int
    key: bytes = b""  # by which it may be written where it lies


class SenderPort(Protocol):
    """What the machine does to the world."""

    def send(self, message: kv_pb2.KvMessage) -> None: ...

    def send_piece(self, slot: LentSlot, piece: Piece) -> None:
        """Packs the piece and sends it into the slot."""

    def send_void(self, slot: LentSlot) -> None: ...

    def blocks_per_payload(self, layout: KvLayout, receiver_slot_bytes: int) -> int:
        """How many blocks fit a slot of both rings; 0 when none does."""

    def granted(self) -> None:
        """The receiver has room for all of it."""

    def closed(self, outcome: Outcome, reason: str) -> None:
        """The last call of a machine: its blocks may go."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """What is to be sent."""

    transfer_id: bytes
    token: bytes
    num_tokens: int  # with KV
    layout: KvLayout  # of the sender's pool
    traceparent: str = ""

    @property
    def num_blocks(self) -> int:
        return self.layout.blocks_for(self.num_tokens)


class Sender:
    """One transfer, prefill side."""

    def __init__(self, shipment: Shipment, port: SenderPort, clock: Callable[[], float]) -> None:
        self.shipment = shipment
        self.state = Send.OFFERED
        self.wire_layout = shipment.layout  # what the receiver asked for, once granted
        self.digest_algorithm = 0  # likewise
        self.first_block = 0
        self.last_progress = clock()
        self.bytes_sent = 0
        self._port = port
        self._clock = clock
        self._per_payload = 0
        self._num_ready = 0  # leading blocks that are computed
        self._num_planned = 0  # leading blocks that are in pieces
        self._pieces: deque[Piece] = deque()  # asked for, no slot yet
        self._first_tokens: Sequence[kv_pb2.FirstToken] | None = None

    @property
    def is_open(self) -> bool:
        return bool(SENDER[self.state])

    @property
    def is_owed_an_answer(self) -> bool:
        """Whether the next step is the receiver's; while GRANTED with nothing to send it is the engine's."""
        return self.state is not Send.GRANTED or bool(self._pieces)

    def offer(self) -> None:
        shipment = self.shipment
        offer = kv_pb2.Offer(
            token=shipment.token, num_tokens=shipment.num_tokens, num_blocks=shipment.num_blocks,
            kv_format=layout_to_wire(shipment.layout), traceparent=shipment.traceparent,
        )  # fmt: skip
        self._send(offer=offer)

    def computed(self, num_tokens: int) -> None:
        """KV of the first `num_tokens` tokens is in the pool. Only whole blocks go, and the last one when all is there."""
        shipment = self.shipment
        is_all = num_tokens >= shipment.num_tokens
        self._num_ready = shipment.num_blocks if is_all else num_tokens // shipment.layout.block_size
        self._pump()

    def finish(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        """The prompt is computed and its first tokens are known: commit as soon as everything is posted."""
        self._first_tokens = first_tokens
        self._pump()

    def abort(self, reason: str, *, tell_peer: bool = True) -> None:
        """Ends the transfer; harmless when it has ended."""
        if not self.is_open:
            return
        self._advance(SendEvent.ABORT)
        self._pieces.clear()
        if tell_peer:
            self._send(abort=kv_pb2.Abort(reason=reason))
        self._port.closed(Outcome.ABORTED, reason)

    def progressed(self) -> None:
        """A payload has left: the peer is there, however long the whole takes."""
        self.last_progress = self._clock()

    def on_message(self, message: kv_pb2.KvMessage) -> None:
        """A control message of the receiver. One that does not fit the state fails the transfer."""
        self.last_progress = self._clock()
        try:
            self._on_message(message)
        except IllegalTransition as exc:
            self.abort(f"protocol: {exc}")

    def _on_message(self, message: kv_pb2.KvMessage) -> None:
        body = message.WhichOneof("body")
        if body == "slots":
            self._on_slots(message.slots)
        elif body == "grant":
            self._on_grant(message.grant)
        elif body == "wait":
            self._advance(SendEvent.WAIT)
        elif body == "refuse":
            self._advance(SendEvent.REFUSE)
            self._port.closed(Outcome.REFUSED, message.refuse.reason)
        elif body == "redirect":
            self._advance(SendEvent.REDIRECT)
            self._port.closed(Outcome.REDIRECTED, message.redirect.reason)
        elif body == "revoke":
            self._advance(SendEvent.REVOKE)
            self._forget_plan()
            self._send(stopped=kv_pb2.Stopped())
        elif body == "received":
            self._advance(SendEvent.RECEIVED)
            self._port.closed(Outcome.RECEIVED, "")
        elif body == "abort":
            self._advance(SendEvent.ABORT)
            self._forget_plan()
            self._send(stopped=kv_pb2.Stopped())
            self._port.closed(Outcome.ABORTED_BY_PEER, message.abort.reason)
        else:
            raise IllegalTransition(f"{body} is not a receiver's word")

    def _on_grant(self, grant: kv_pb2.Grant) -> None:
        self._advance(SendEvent.GRANT)
        layout = layout_from_wire(grant.kv_format)
        fits = grant.kv_format.tp_size == 1 and self.shipment.layout.converts_to(layout)
        if not fits or grant.digest_algorithm not in DIGESTS or grant.first_block > self.shipment.num_blocks:
            self.abort("grant does not fit the offer")
            return
        self._per_payload = self._port.blocks_per_payload(layout, grant.slot_bytes)
        if not self._per_payload:
            self.abort(f"a block of {layout.block_bytes} bytes does not fit a slot of both rings")
            return
        self.wire_layout, self.digest_algorithm = layout, grant.digest_algorithm
        self.first_block = self._num_planned = grant.first_block
        self._port.granted()
        self._pump()

    def _on_slots(self, slots: kv_pb2.Slots) -> None:
        """Whatever was lent is filled, so that its receive completes; more than was asked for fails the transfer."""
        lent = [LentSlot(slot.index, slot.generation, slot.key) for slot in slots.slots]
        for slot in lent:
            if self.state is Send.GRANTED and self._pieces:
                self._port.send_piece(slot, self._pieces.popleft())
            else:
                self._port.send_void(slot)
        self._advance(SendEvent.SLOTS)
        self._pump()

    def _pump(self) -> None:
        """Asks for slots for what became ready, and commits when nothing is left to post."""
        if self.state is not Send.GRANTED:
            return
        end = self._end_of_plan()
        if end > self._num_planned:
            starts = range(self._num_planned, end, self._per_payload)
            self._pieces.extend(Piece(start, min(start + self._per_payload, end)) for start in starts)
            num_bytes = (end - self._num_planned) * self.wire_layout.block_bytes
            self._num_planned = end
            self.last_progress = self._clock()  # from here on the receiver owes an answer
            self._advance(SendEvent.WANT)
            self._send(want=kv_pb2.Want(bytes=num_bytes, num_slots=len(starts)))
        if self._first_tokens is not None and self._num_planned == self.shipment.num_blocks and not self._pieces:
            self.last_progress = self._clock()
            self._advance(SendEvent.COMMIT)
            self._send(commit=kv_pb2.Commit(num_blocks=self.shipment.num_blocks, first_tokens=self._first_tokens))

    def _end_of_plan(self) -> int:
        """What is ready, but for less than half a payload that can wait for the next chunk: whatever its size, a payload costs
        about 0.6 ms of the core that computes, and what waits for the last chunk costs less."""
        end = self._num_ready
        rest = (end - self._num_planned) % self._per_payload
        return end - rest if end < self.shipment.num_blocks and 2 * rest < self._per_payload else end

    def _forget_plan(self) -> None:
        self._pieces.clear()
        self._num_planned = 0

    def _advance(self, event: SendEvent) -> None:
        self.state = advance(SENDER, self.state, event)

    def _send(self, **body: object) -> None:
        self._port.send(kv_pb2.KvMessage(transfer_id=self.shipment.transfer_id, **body))  # type: ignore[arg-type]
