"""The receiving machine of one hand-off. Sans-IO: it talks through a `ReceiverPort` and a `Sink` and never waits.

Invariants: it holds pool blocks only from grant to ready or close; a block counts only once its digest was verified and
its bytes were written; a payload for a transfer that is not open is dropped; `Sink.closed` or `Sink.ready` is called
exactly once.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvtransfer.frames import TARGET_CACHE, FrameError, Payload, bind, check_layout
from kvtransfer.protocol import RECEIVER, Recv, RecvEvent
from kvtransfer.ring import RingSlot
from splitfire.core.layout import KvLayout
from splitfire.core.lifecycle import IllegalTransition, advance
from splitfire.core.wire import layout_from_wire, layout_to_wire
from splitfire.v1 import kv_pb2


class Room(Enum):
    """What a sink says to an offer when it does not grant."""

    NOT_NOW = "not now"
    NEVER = "never"


class Sink(Protocol):
    """The owner of the pool the blocks go to. All calls on the io thread."""

    def reserve(self) -> int | Room:
        """Reserves blocks for the whole transfer; the first logical block that is needed (those before are here)."""

    def block_sums(self, blocks: memoryview, num_blocks: int) -> list[int]:
        """The data part of each block's digest (kv.proto)."""

    def write(self, first_block: int, num_blocks: int, dtype: str, blocks: memoryview) -> None:
        """Verified blocks, to be converted and written."""

    def ready(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        """Everything is here. The last call."""

    def closed(self, reason: str, is_retryable: bool) -> None:
        """The transfer failed; what was reserved is to be given back. The last call."""


class ReceiverPort(Protocol):
    """What the machine does to the wire and to the ring."""

    def send(self, message: kv_pb2.KvMessage) -> None: ...

    def lend(self) -> None:
        """The receiver wants slots: lend when its turn comes, by calling `lend_now`."""

    def finished(self) -> None:
        """The machine will not do anything any more."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the router said will come, and from whom."""

    transfer_id: bytes
    token: bytes
    incarnation: bytes  # of the sender
    num_tokens: int
    layout: KvLayout  # of the pool here; payloads arrive in its dtype
    fingerprint: bytes  # first 8 bytes

    @property
    def num_blocks(self) -> int:
        return self.layout.blocks_for(self.num_tokens)


class Receiver:
    """One transfer, decode side."""

    def __init__(
        self, expectation: Expectation, sink: Sink, port: ReceiverPort, slot_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.expectation = expectation
        self.state = Recv.EXPECTED
        self.expected_at = self.waiting_since = self.last_progress = clock()
        self.num_slots_wanted = 0
        self.lent: dict[tuple[int, int], RingSlot] = {}
        self.bytes_received = 0
        self.wanted_at: float | None = None
        self.done_at: float | None = None
        self._sink = sink
        self._port = port
        self._clock = clock
        self._slot_bytes = slot_bytes
        self._first_block = 0
        self._verified: set[int] = set()
        self._first_tokens: Sequence[kv_pb2.FirstToken] = ()

    @property
    def is_open(self) -> bool:
        return bool(RECEIVER[self.state]) and self.state is not Recv.DRAINING

    @property
    def num_blocks_received(self) -> int:
        return len(self._verified)

    def on_message(self, message: kv_pb2.KvMessage) -> None:
        """A control message of the sender. One that does not fit the state fails the transfer."""
        self.last_progress = self._clock()
        try:
            body = message.WhichOneof("body")
            if body == "offer":
                self._on_offer(message.offer)
            elif body == "want":
                self._on_want(message.want)
            elif body == "commit":
                self._on_commit(message.commit)
            elif body == "abort":
                self.close(message.abort.reason, is_retryable=True, tell_peer=False)
        except IllegalTransition as exc:
            self.close(f"protocol: {exc}", is_retryable=True)

    def try_reserve(self) -> None:
        """Grants, waits or refuses. Called again by the agent while it waits."""
        room = self._sink.reserve()
        if room is Room.NOT_NOW:
            if self.state is not Recv.WAITING:
                self._advance(RecvEvent.WAIT)
                self.waiting_since = self._clock()
                self._send(wait=kv_pb2.Wait(reason="no free blocks"))
        elif room is Room.NEVER:
            self.refuse("the request needs more blocks than this worker has", is_retryable=False)
        else:
            assert isinstance(room, int)
            self._advance(RecvEvent.GRANT)
            self._first_block = room
            self._send(
                grant=kv_pb2.Grant(first_block=room, kv_format=layout_to_wire(self.expectation.layout), slot_bytes=self._slot_bytes)
            )

    def refuse(self, reason: str, *, is_retryable: bool) -> None:
        self._advance(RecvEvent.REFUSE)
        self._send(refuse=kv_pb2.Refuse(reason=reason, is_retryable=is_retryable))
        try:
            self._sink.closed(reason, is_retryable)
        finally:
            self._port.finished()

    def lend_now(self, slot: RingSlot) -> kv_pb2.Slot:
        """The agent has a slot for this transfer, and posts a receive in it."""
        self.num_slots_wanted -= 1
        self.lent[(slot.index, slot.generation)] = slot
        return kv_pb2.Slot(index=slot.index, generation=slot.generation, bytes=len(slot.buffer))

    def on_payload(self, slot: RingSlot, payload: Payload | None) -> None:
        """The receive in `slot` completed: with blocks, or (None) with a void. The agent takes the slot back afterwards."""
        self.last_progress = self._clock()
        self.lent.pop((slot.index, slot.generation), None)
        if self.state is Recv.DRAINING:
            if not self.lent:
                self._advance(RecvEvent.DRAINED)
                self._port.finished()
            return
        if payload is None or self.state not in (Recv.GRANTED, Recv.COMMITTED):
            return
        try:
            self._take(slot, payload)
        except FrameError as exc:
            self.close(exc.reason, is_retryable=True)
            return
        self._complete()

    def close(self, reason: str, *, is_retryable: bool, tell_peer: bool = True) -> None:
        """Ends the transfer from this side; pool blocks are free at once, slots once their receives have completed."""
        if not self.is_open:
            return
        self.num_slots_wanted = 0
        self._advance(RecvEvent.DRAIN if self.lent else RecvEvent.ABORT)
        if tell_peer:
            self._send(abort=kv_pb2.Abort(reason=reason))
        try:
            self._sink.closed(reason, is_retryable)
        finally:
            if not self.lent:
                self._port.finished()

    def _on_offer(self, offer: kv_pb2.Offer) -> None:
        if self.state is not Recv.EXPECTED:  # a repeated offer changes nothing
            return
        expected = self.expectation
        layout = layout_from_wire(offer.kv_format)
        if not hmac.compare_digest(offer.token, expected.token):
            self.refuse("unknown_transfer", is_retryable=True)
        elif offer.kv_format.tp_size != 1 or not layout.converts_to(expected.layout):
            self.refuse("kv formats cannot be converted", is_retryable=False)
        elif offer.num_tokens != expected.num_tokens or offer.num_blocks != expected.num_blocks:
            self.refuse("size_mismatch", is_retryable=True)
        else:
            self.try_reserve()

    def _on_want(self, want: kv_pb2.Want) -> None:
        if self.state is not Recv.GRANTED:
            raise IllegalTransition(f"want is not possible in {self.state.value}")
        block_bytes = self.expectation.layout.block_bytes
        num_blocks = want.bytes // block_bytes
        if want.bytes % block_bytes or not 0 < want.num_slots <= num_blocks <= self.expectation.num_blocks:
            raise IllegalTransition(f"wants {want.bytes} bytes, blocks have {block_bytes}")
        self.wanted_at = self.wanted_at or self._clock()
        self.num_slots_wanted += want.num_slots
        self._port.lend()

    def _on_commit(self, commit: kv_pb2.Commit) -> None:
        if commit.num_blocks != self.expectation.num_blocks or not commit.first_tokens:
            raise IllegalTransition(f"commits {commit.num_blocks} blocks, offered were {self.expectation.num_blocks}")
        self._advance(RecvEvent.COMMIT)
        self._first_tokens = tuple(commit.first_tokens)
        self._complete()

    def _take(self, slot: RingSlot, payload: Payload) -> None:
        header, expected = payload.header, self.expectation
        check_layout(header, expected.layout)
        if header.fingerprint != expected.fingerprint:
            raise FrameError("bad_fingerprint")
        if (header.transfer_id, header.cache_id) != (expected.transfer_id, TARGET_CACHE):
            raise FrameError("not_owner")
        if (header.slot, header.generation) != (slot.index, slot.generation):
            raise FrameError("bad_generation")
        blocks = range(header.block_start, header.block_end)
        if blocks.start < self._first_block or blocks.stop > expected.num_blocks or self._verified.intersection(blocks):
            raise FrameError("bad_block_range", f"[{blocks.start}, {blocks.stop})")
        is_last = blocks.stop == expected.num_blocks
        if header.num_tokens != (expected.num_tokens if is_last else blocks.stop * expected.layout.block_size) - (
            blocks.start * expected.layout.block_size
        ):
            raise FrameError("bad_token_count", str(header.num_tokens))
        if tuple(bind(header, self._sink.block_sums(payload.blocks, len(blocks)))) != payload.digests:
            raise FrameError("kv_digest_mismatch")
        self._advance(RecvEvent.PAYLOAD)
        self._sink.write(blocks.start, len(blocks), header.dtype, payload.blocks)
        self._verified.update(blocks)
        self.bytes_received += header.payload_bytes

    def _complete(self) -> None:
        """Ready when the commit is in and every block it counts has been verified, in whatever order they came."""
        if self.state is Recv.COMMITTED and len(self._verified) == self.expectation.num_blocks - self._first_block:
            self._advance(RecvEvent.COMPLETE)
            self.done_at = self._clock()
            self._send(received=kv_pb2.Received())
            try:
                self._sink.ready(self._first_tokens)
            except Exception:
                self._sink.closed("internal", is_retryable=False)
                raise
            finally:
                self._port.finished()

    def _advance(self, event: RecvEvent) -> None:
        self.state = advance(RECEIVER, self.state, event)

    def _send(self, **body: object) -> None:
        self._port.send(kv_pb2.KvMessage(transfer_id=self.expectation.transfer_id, **body))  # type: ignore[arg-type]
