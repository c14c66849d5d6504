"""Group C of bad inputs at the receiving machine: a sender that is wrong or lies gets nothing published and ends only itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvtransfer.expectation import Expectation
from kvtransfer.frames import DIGEST_OFF, DIGEST_SUM64, Payload, PayloadHeader, bind
from kvtransfer.protocol import Recv
from kvtransfer.receiver import Receiver
from kvtransfer.ring import Ring, RingOptions, RingSlot
from kvtransfer.transport import SlotMemory
from splitfire.core.wire import layout_to_wire
from splitfire.v1 import kv_pb2
from tests.kvtransfer.fakes import FINGERPRINT, LAYOUT, FakeSink, content, sums_of

ID, TOKEN = b"a" * 16, b"t" * 16
NUM_TOKENS, NUM_BLOCKS = 40, 3


class Bench:
    """A receiver with a port that writes everything down."""

    def __init__(self, *, digest: int = DIGEST_SUM64) -> None:
        self.sink = FakeSink(1)
        self.sent: list[kv_pb2.KvMessage] = []
        self.num_finished = 0
        self.ring = Ring(RingOptions(8, 4096, 1), lambda size: SlotMemory(memoryview(bytearray(size))))
        expectation = Expectation(ID, TOKEN, b"i" * 16, NUM_TOKENS, LAYOUT, FINGERPRINT[:8], digest_algorithm=digest)
        self.receiver = Receiver(expectation, self.sink, self, 4096, lambda: 0.0)

    def send(self, message: kv_pb2.KvMessage) -> None:
        self.sent.append(message)

    def ask_room(self) -> None:
        self.receiver.try_reserve()

    def lend(self) -> None: ...

    def finished(self) -> None:
        self.num_finished += 1

    @property
    def said(self) -> list[str]:
        return [str(m.WhichOneof("body")) for m in self.sent]

    def offer(self, **changes: object) -> None:
        fields: dict[str, object] = {
            "token": TOKEN, "num_tokens": NUM_TOKENS, "num_blocks": NUM_BLOCKS, "kv_format": layout_to_wire(LAYOUT), **changes,
        }  # fmt: skip
        self.hear(offer=kv_pb2.Offer(**fields))  # type: ignore[arg-type]

    def hear(self, **body: object) -> None:
        self.receiver.on_message(kv_pb2.KvMessage(transfer_id=ID, **body))  # type: ignore[arg-type]

    def want(self, blocks: int = NUM_BLOCKS) -> list[RingSlot]:
        """Asks for a slot a block; they are lent."""
        self.hear(want=kv_pb2.Want(bytes=blocks * LAYOUT.block_bytes, num_slots=blocks))
        slots = [slot for _ in range(blocks) if (slot := self.ring.segment(b"peer").lend()) is not None]
        for slot in slots:
            self.receiver.lend_now(slot)
        return slots

    def payload(self, slot: RingSlot, block: int, change: Callable[[PayloadHeader], PayloadHeader] = lambda h: h) -> Payload:
        """Block `block` as its sender would send it, but for `change`; the digest is right for what is said."""
        data = memoryview(bytearray(content(1, block, LAYOUT.block_bytes)))
        header = change(
            PayloadHeader(
                FINGERPRINT[:8], ID, slot.index, slot.generation, 0, "fp32", self.receiver.expectation.digest_algorithm, 0, 2, 0, 2,
                block, block + 1, min(16, NUM_TOKENS - 16 * block), LAYOUT.block_bytes, LAYOUT.block_bytes,
            )
        )  # fmt: skip
        return Payload(header, tuple(bind(header, sums_of(data, 1))), data)

    def commit(self, **changes: object) -> None:
        self.hear(commit=kv_pb2.Commit(**{"num_blocks": NUM_BLOCKS, "first_tokens": [kv_pb2.FirstToken(token_id=1)], **changes}))  # type: ignore[arg-type]

    def assert_failed(self, reason: str) -> None:
        assert self.sink.end == reason and not self.sink.holds_blocks
        assert not self.receiver.is_open and "received" not in self.said


def granted(**options: int) -> Bench:
    bench = Bench(**options)
    bench.offer()
    assert bench.receiver.state is Recv.GRANTED
    return bench


def test_all_blocks_then_the_commit() -> None:
    bench = granted()
    for block, slot in enumerate(bench.want()):
        bench.receiver.on_payload(slot, bench.payload(slot, block))
    bench.commit()
    bench.sink.assert_right(NUM_BLOCKS)
    assert bench.said == ["grant", "received"] and bench.num_finished == 1


@pytest.mark.parametrize("order", [(0, 1, 2, "c"), (2, 0, "c", 1), ("c", 2, 1, 0), (1, "c", 0, 2)])
def test_the_commit_and_the_payloads_may_come_in_any_order(order: tuple[int | str, ...]) -> None:
    """F41: ready exactly when the last of them is here."""
    bench = granted()
    slots = bench.want()
    for what in order:
        assert not bench.sink.end
        if isinstance(what, int):
            bench.receiver.on_payload(slots[what], bench.payload(slots[what], what))
        else:
            bench.commit()
    bench.sink.assert_right(NUM_BLOCKS)


OLDER_GENERATION = (lambda h: replace(h, generation=h.generation - 1), "bad_generation")  # of a lending that is over


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        OLDER_GENERATION,  # B70
        (lambda h: replace(h, generation=h.generation + 1), "bad_generation"),
        (lambda h: replace(h, slot=h.slot + 1), "bad_generation"),
        (lambda h: replace(h, generation=2**32 - 1), "bad_generation"),
        (lambda h: replace(h, transfer_id=b"b" * 16), "not_owner"),  # B82
        (lambda h: replace(h, cache_id=1), "not_owner"),
        (lambda h: replace(h, fingerprint=b"x" * 8), "bad_fingerprint"),  # B76
        (lambda h: replace(h, layer_start=1), "bad_layer_range"),  # B71
        (lambda h: replace(h, layer_end=0), "bad_layer_range"),
        (lambda h: replace(h, head_end=9), "bad_head_range"),
        (lambda h: replace(h, block_start=3, block_end=4), "bad_block_range"),
        (lambda h: replace(h, block_start=2**31, block_end=2**31 + 1, num_tokens=16), "bad_block_range"),  # B73
        (lambda h: replace(h, num_tokens=15), "bad_token_count"),
        (lambda h: replace(h, num_tokens=0), "bad_token_count"),
        (lambda h: replace(h, dtype="bf16"), "bad_dtype"),  # B86
        (lambda h: replace(h, digest_algorithm=DIGEST_OFF), "unknown_digest"),  # B74: missing
    ],
)
def test_a_payload_that_is_not_what_was_lent_for_is_refused(change: Callable[[PayloadHeader], PayloadHeader], reason: str) -> None:
    bench = granted()
    slot, *_ = bench.want()
    bench.receiver.on_payload(slot, bench.payload(slot, 0, change))
    bench.assert_failed(reason)
    assert not bench.sink.written


def test_a_wrong_digest_publishes_nothing_and_acknowledges_nothing() -> None:
    """B74, and the commit is in already."""
    bench = granted()
    slots = bench.want()
    for block in (0, 1):
        bench.receiver.on_payload(slots[block], bench.payload(slots[block], block))
    bench.commit()
    payload = bench.payload(slots[2], 2)
    payload.blocks[100] ^= 1
    published = set(bench.sink.written)
    bench.receiver.on_payload(slots[2], payload)
    bench.assert_failed("kv_digest_mismatch")
    assert published == {0, 1}, "the last one never was"


def test_without_a_digest_none_is_looked_at_and_everything_else_is() -> None:
    bench = granted(digest=DIGEST_OFF)
    assert bench.sent[0].grant.digest_algorithm == DIGEST_OFF
    slots = bench.want()
    for block, slot in enumerate(slots):
        bench.receiver.on_payload(slot, bench.payload(slot, block))
    bench.commit()
    bench.sink.assert_right(NUM_BLOCKS)
    bench = granted(digest=DIGEST_OFF)
    slot, *_ = bench.want()
    bench.receiver.on_payload(slot, bench.payload(slot, 0, lambda h: replace(h, digest_algorithm=DIGEST_SUM64)))
    bench.assert_failed("unknown_digest")


def test_a_block_that_comes_twice_ends_the_transfer() -> None:
    bench = granted()
    slots = bench.want()
    bench.receiver.on_payload(slots[0], bench.payload(slots[0], 0))
    bench.receiver.on_payload(slots[1], bench.payload(slots[1], 0))
    bench.assert_failed("bad_block_range")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token": b"x" * 16}, "unknown_transfer"),
        ({"token": b""}, "unknown_transfer"),
        ({"num_tokens": 41}, "size_mismatch"),
        ({"num_blocks": 2**32 - 1}, "size_mismatch"),
        ({"kv_format": layout_to_wire(replace(LAYOUT, num_layers=3))}, "kv formats cannot be converted"),
        ({"kv_format": layout_to_wire(replace(LAYOUT, dtype="x" * 1000))}, "kv formats cannot be converted"),  # B86
    ],
)
def test_an_offer_that_is_not_what_the_router_said_is_refused(changes: dict[str, object], reason: str) -> None:
    """B75, B76."""
    bench = Bench()
    bench.offer(**changes)
    assert bench.said == ["refuse"]
    assert bench.sink.end == reason and not bench.sink.holds_blocks and bench.num_finished == 1


@pytest.mark.parametrize(
    "want",
    [
        kv_pb2.Want(bytes=0, num_slots=0),
        kv_pb2.Want(bytes=LAYOUT.block_bytes + 1, num_slots=1),
        kv_pb2.Want(bytes=LAYOUT.block_bytes, num_slots=2),
        kv_pb2.Want(bytes=2**63, num_slots=2**32 - 1),
        kv_pb2.Want(bytes=4 * LAYOUT.block_bytes, num_slots=1),
    ],
)
def test_a_want_that_makes_no_sense_ends_the_transfer(want: kv_pb2.Want) -> None:
    """B72, B73."""
    bench = granted()
    bench.hear(want=want)
    assert bench.sink.end.startswith("protocol: ") and not bench.sink.holds_blocks


def test_wants_are_bounded_by_the_blocks_there_are() -> None:
    bench = granted()
    for _ in range(100):
        if not bench.receiver.is_open:
            break
        bench.hear(want=kv_pb2.Want(bytes=LAYOUT.block_bytes, num_slots=1))
    assert bench.receiver.num_slots_wanted == 0 and bench.sink.end.startswith("protocol: ")


@pytest.mark.parametrize("changes", [{"num_blocks": 2}, {"num_blocks": 4}, {"first_tokens": []}])  # B85: absent
def test_a_commit_that_does_not_fit_the_offer_ends_the_transfer(changes: dict[str, object]) -> None:
    bench = granted()
    bench.commit(**changes)
    assert bench.sink.end.startswith("protocol: ")


def test_a_commit_of_blocks_that_were_never_sent_ends_the_transfer() -> None:
    bench = granted()
    slot, *_ = bench.want(1)
    bench.receiver.on_payload(slot, bench.payload(slot, 0))
    bench.commit()
    bench.assert_failed("incomplete")


@pytest.mark.parametrize("body", ["want", "commit", "grant", "slots", "received", "redirect", "refuse", "wait", "revoke"])
def test_a_word_out_of_turn_ends_its_transfer_alone(body: str) -> None:
    bench = Bench()
    bench.hear(**{body: getattr(kv_pb2, {"redirect": "RedirectOffer"}.get(body, body.capitalize()))()})
    assert bench.sink.end.startswith("protocol: ") and not bench.receiver.is_open


def test_a_revoke_gives_everything_back_and_the_sender_sends_again() -> None:
    bench = granted()
    slots = bench.want(2)
    bench.receiver.on_payload(slots[0], bench.payload(slots[0], 0))
    bench.receiver.revoke("test")
    assert not bench.sink.holds_blocks and bench.sink.num_revoked == 1
    bench.hear(want=kv_pb2.Want(bytes=LAYOUT.block_bytes, num_slots=1))  # crossed the revoke
    bench.commit()
    bench.hear(stopped=kv_pb2.Stopped())
    assert bench.receiver.state is Recv.REVOKING, "a slot is still lent"
    bench.receiver.on_payload(slots[1], bench.payload(slots[1], 1))
    assert bench.said == ["grant", "revoke", "grant"]
    for block, slot in enumerate(bench.want()):
        bench.receiver.on_payload(slot, bench.payload(slot, block))
    bench.commit()
    bench.sink.assert_right(NUM_BLOCKS)


@pytest.mark.parametrize("first", [0, 1])
def test_completion_order_permutations(first: int) -> None:
    """F83: after an abort the lent slots come back in either order, blocks are freed once, and the machine finishes once."""
    bench = granted()
    slots = bench.want(2)
    bench.receiver.close("test", is_retryable=True)
    bench.receiver.close("again", is_retryable=True)
    assert bench.sink.end == "test" and bench.num_finished == 0
    for slot in (slots[first], slots[1 - first]):
        bench.receiver.on_payload(slot, None)
    assert bench.receiver.state is Recv.ABORTED and bench.num_finished == 1


def test_late_done_ignored() -> None:
    """F82: what the sender says after the end changes nothing."""
    bench = granted()
    bench.receiver.close("test", is_retryable=True)
    bench.commit()
    bench.hear(abort=kv_pb2.Abort(reason="late"))
    assert bench.sink.end == "test" and bench.num_finished == 1


def test_full_prefix_hit_completes() -> None:
    """F84: nothing has to move, and both ends still come to their end."""
    bench = Bench()
    bench.sink.first_block = NUM_BLOCKS
    bench.offer()
    bench.commit()
    assert bench.sink.end == "ready" and bench.said == ["grant", "received"]
