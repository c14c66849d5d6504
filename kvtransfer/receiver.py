"""The receiving machine of one hand-off. Sans-IO: it talks through a `ReceiverPort` and a `Sink` and never waits.

Invariants: it holds pool blocks only from grant to ready, revoke or close; a block counts, and is published, only once
its digest was verified; a payload that is not of the present grant is dropped; `Sink.closed` or `Sink.ready` is called
exactly once.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from typing import Protocol

from kvtransfer.expectation import Expectation, Room, Sink
from kvtransfer.frames import DIGEST_OFF, TARGET_CACHE, FrameError, Payload, bind, check_layout
from kvtransfer.protocol import RECEIVER, Recv, RecvEvent
from kvtransfer.ring import RingSlot
from splitfire.core.lifecycle import IllegalTransition, advance
from splitfire.core.wire import layout_from_wire, layout_to_wire
from splitfire.v1 import kv_pb2


class ReceiverPort(Protocol):
    """What the machine does to the wire and to the ring."""

    def send(self, message: kv_pb2.KvMessage) -> None: ...

    def ask_room(self) -> None:
        """An offer is in: call `try_reserve` when its turn comes, now or later."""

    def lend(self) -> None:
        """The receiver wants slots: lend when its turn comes, by calling `lend_now`."""

    def finished(self) -> None:
        """The machine will not do anything any more."""


class Receiver:
    """One transfer, decode side."""

    def __init__(
        self, expectation: Expectation, sink: Sink, port: ReceiverPort, slot_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.expectation = expectation
        self.state = Recv.EXPECTED
        self.began = self.waiting_since = self.last_progress = clock()
        self.num_slots_wanted = 0
        self.num_revoked = 0
        self.lent: dict[tuple[int, int], RingSlot] = {}
        self.bytes_received = 0
        self.wanted_at: float | None = None
        self.done_at: float | None = None
        self.unpack_s = 0.0  # since the last want, which comes when the prompt is computed: what came before it was hidden
        self._sink = sink
        self._port = port
        self._clock = clock
        self._slot_bytes = slot_bytes
        self._first_block = 0
        self._has_stopped = False  # the sender, since the last revoke
        self._was_voided = False  # a slot came back empty: the sender gave up, and says so next
        self._verified: set[int] = set()
        self._first_tokens: Sequence[kv_pb2.FirstToken] = ()

    @property
    def is_open(self) -> bool:
        return bool(RECEIVER[self.state]) and self.state is not Recv.DRAINING

    @property
    def is_short(self) -> bool:
        """It has an offer and no blocks."""
        return self.state in (Recv.OFFERED, Recv.WAITING)

    @property
    def is_owed_a_word(self) -> bool:
        """Whether the next step is the sender's: something it promised to send is not here."""
        is_promised = bool(self.lent) or self._was_voided
        return self.state in (Recv.COMMITTED, Recv.REVOKING) or (self.state is Recv.GRANTED and is_promised)

    @property
    def num_blocks_received(self) -> int:
        return len(self._verified)

    # -- what the sender says

    def on_message(self, message: kv_pb2.KvMessage) -> None:
        """A control message of the sender. One that does not fit the state fails the transfer."""
        self.last_progress = self._clock()
        try:
            self._on_message(message)
        except IllegalTransition as exc:
            self.close(f"protocol: {exc}", is_retryable=True)

    def _on_message(self, message: kv_pb2.KvMessage) -> None:
        body = message.WhichOneof("body")
        if body == "offer":
            self._on_offer(message.offer)
        elif body == "want":
            self._on_want(message.want)
        elif body == "commit":
            self._on_commit(message.commit)
        elif body == "abort":
            self.close(message.abort.reason, is_retryable=True, tell_peer=False)
        elif body == "stopped" and self.state is not Recv.DRAINING:  # there it only says that the slots are on their way
            self._advance(RecvEvent.STOPPED)
            self._has_stopped = True
            self._settle_revoke()
        elif body != "stopped":
            raise IllegalTransition(f"{body} is not a sender's word")

    def _on_offer(self, offer: kv_pb2.Offer) -> None:
        if self.state is not Recv.EXPECTED:  # a repeated offer changes nothing
            return
        self._advance(RecvEvent.OFFER)
        expected = self.expectation
        layout = layout_from_wire(offer.kv_format)
        if not hmac.compare_digest(offer.token, expected.token):
            self.refuse("unknown_transfer", is_retryable=True)
        elif offer.kv_format.tp_size != 1 or not layout.converts_to(expected.layout):
            self.refuse("kv formats cannot be converted", is_retryable=False)
        elif offer.num_tokens != expected.num_tokens or offer.num_blocks != expected.num_blocks:
            self.refuse("size_mismatch", is_retryable=True)
        else:
            self.waiting_since = self._clock()
            self._port.ask_room()

    def _on_want(self, want: kv_pb2.Want) -> None:
        self._advance(RecvEvent.WANT)
        if self.state is Recv.REVOKING:
            return
        block_bytes = self.expectation.layout.block_bytes
        num_blocks = want.bytes // block_bytes
        if want.bytes % block_bytes or not 0 < want.num_slots <= num_blocks <= self.expectation.num_blocks:
            raise IllegalTransition(f"wants {want.bytes} bytes, blocks have {block_bytes}")
        self.wanted_at = self.wanted_at or self._clock()
        self.unpack_s = 0.0
        self.num_slots_wanted += want.num_slots
        if self.num_slots_wanted > self.expectation.num_blocks:
            raise IllegalTransition(f"wants {self.num_slots_wanted} slots for {self.expectation.num_blocks} blocks")
        self._port.lend()

    def _on_commit(self, commit: kv_pb2.Commit) -> None:
        self._advance(RecvEvent.COMMIT)
        if self.state is Recv.REVOKING:
            return
        if commit.num_blocks != self.expectation.num_blocks or not commit.first_tokens:
            raise IllegalTransition(f"commits {commit.num_blocks} blocks, offered were {self.expectation.num_blocks}")
        self._first_tokens = tuple(commit.first_tokens)
        self._complete()

    # -- what its owner decides

    def try_reserve(self) -> None:
        """Grants if the sink has room, else waits. Only while `is_short`."""
        room = self._sink.reserve()
        if room is Room.NEVER:
            self.refuse("the request needs more blocks than this worker has", is_retryable=False)
        elif isinstance(room, int):
            self._advance(RecvEvent.GRANT)
            self._first_block = room
            self._send(
                grant=kv_pb2.Grant(
                    first_block=room,
                    kv_format=layout_to_wire(self.expectation.layout),
                    slot_bytes=self._slot_bytes,
                    digest_algorithm=self.expectation.digest_algorithm,
                )
            )
        else:
            self.wait()

    def wait(self) -> None:
        """Not its turn, or no room: the sender is told once."""
        if self.state is Recv.OFFERED:
            self._advance(RecvEvent.WAIT)
            self._send(wait=kv_pb2.Wait(reason="no free blocks"))

    def refuse(self, reason: str, *, is_retryable: bool) -> None:
        self._advance(RecvEvent.REFUSE)
        self._send(refuse=kv_pb2.Refuse(reason=reason, is_retryable=is_retryable))
        self._end(reason, is_retryable)

    def redirect(self, reason: str) -> None:
        """It waited long enough here: the sender keeps its blocks, and the router may name another receiver."""
        self._advance(RecvEvent.REDIRECT)
        self._send(redirect=kv_pb2.RedirectOffer(reason=reason))
        self._end(reason, is_retryable=True)

    def revoke(self, reason: str) -> None:
        """Gives the blocks back at once; the sender sends again after the next grant, without computing again."""
        self._advance(RecvEvent.REVOKE)
        self.num_revoked += 1
        self.num_slots_wanted = 0
        self._has_stopped = False
        self._verified.clear()
        self._send(revoke=kv_pb2.Revoke(reason=reason))
        self._sink.revoked()

    def close(self, reason: str, *, is_retryable: bool, tell_peer: bool = True) -> None:
        """Ends the transfer from this side; pool blocks are free at once, slots once their receives have completed."""
        if not self.is_open:
            return
        self.num_slots_wanted = 0
        self._advance(RecvEvent.DRAIN if self.lent else RecvEvent.ABORT)
        if tell_peer:
            self._send(abort=kv_pb2.Abort(reason=reason))
        self._end(reason, is_retryable)

    # -- slots

    def lend_now(self, slot: RingSlot) -> kv_pb2.Slot:
        """The agent has a slot for this transfer, and posts a receive in it."""
        self.num_slots_wanted -= 1
        self.lent[(slot.index, slot.generation)] = slot
        return kv_pb2.Slot(index=slot.index, generation=slot.generation, bytes=len(slot.buffer), key=slot.memory.key)

    def on_payload(self, slot: RingSlot, payload: Payload | None) -> None:
        """The receive in `slot` completed: with blocks, or (None) with a void. The agent takes the slot back afterwards."""
        self.last_progress = self._clock()
        del self.lent[(slot.index, slot.generation)]
        if self.state in (Recv.GRANTED, Recv.COMMITTED):
            try:
                if payload is not None:
                    self._take(slot, payload)
                else:
                    self._was_voided = True
            except FrameError as exc:
                self.close(exc.reason, is_retryable=True)
                return
            self._complete()
        elif self.state in (Recv.REVOKING, Recv.DRAINING):
            self._advance(RecvEvent.PAYLOAD)
            if self.state is Recv.REVOKING:
                self._settle_revoke()
            elif not self.lent:
                self._advance(RecvEvent.DRAINED)
                self._port.finished()

    # -- inside

    def _take(self, slot: RingSlot, payload: Payload) -> None:
        header, expected = payload.header, self.expectation
        check_layout(header, expected.layout)
        if header.fingerprint != expected.fingerprint:
            raise FrameError("bad_fingerprint")
        if header.digest_algorithm != expected.digest_algorithm:
            raise FrameError("unknown_digest", f"{header.digest_algorithm}, granted: {expected.digest_algorithm}")
        if (header.transfer_id, header.cache_id) != (expected.transfer_id, TARGET_CACHE):
            raise FrameError("not_owner")
        if (header.slot, header.generation) != (slot.index, slot.generation):
            raise FrameError("bad_generation")
        blocks = range(header.block_start, header.block_end)
        if blocks.start < self._first_block or blocks.stop > expected.num_blocks or self._verified.intersection(blocks):
            raise FrameError("bad_block_range", f"[{blocks.start}, {blocks.stop})")
        valid = min(expected.num_tokens, blocks.stop * expected.layout.block_size) - blocks.start * expected.layout.block_size
        if header.num_tokens != valid:
            raise FrameError("bad_token_count", str(header.num_tokens))
        began = self._clock()
        sums = self._sink.write(blocks.start, len(blocks), payload.blocks)
        self.unpack_s += self._clock() - began
        if expected.digest_algorithm != DIGEST_OFF and tuple(bind(header, sums)) != payload.digests:
            raise FrameError("kv_digest_mismatch")
        self._advance(RecvEvent.PAYLOAD)
        self._sink.publish(blocks.start, len(blocks))
        self._verified.update(blocks)
        self.bytes_received += header.payload_bytes

    def _complete(self) -> None:
        """Ready when the commit is in and every block it counts has been verified, in whatever order they came."""
        if self.state is not Recv.COMMITTED:
            return
        if len(self._verified) < self.expectation.num_blocks - self._first_block:
            if not self.lent and not self.num_slots_wanted:
                self.close("incomplete", is_retryable=True)
            return
        self._advance(RecvEvent.COMPLETE)
        self.done_at = self._clock()
        try:
            self._sink.ready(self._first_tokens)
        except Exception:
            self._sink.closed("internal", is_retryable=False)
            raise
        finally:  # the sender may let go, whatever becomes of it here; the sequence comes first
            self._send(received=kv_pb2.Received())
            self._port.finished()

    def _settle_revoke(self) -> None:
        """Nothing of the grant before is on the wire any more: a new one can be told from it."""
        if self._has_stopped and not self.lent:
            self._advance(RecvEvent.DRAINED)
            self.waiting_since = self._clock()
            self._port.ask_room()

    def _end(self, reason: str, is_retryable: bool) -> None:
        try:
            self._sink.closed(reason, is_retryable)
        finally:
            if not self.lent:
                self._port.finished()

    def _advance(self, event: RecvEvent) -> None:
        self.state = advance(RECEIVER, self.state, event)

    def _send(self, **body: object) -> None:
        self._port.send(kv_pb2.KvMessage(transfer_id=self.expectation.transfer_id, **body))  # type: ignore[arg-type]
