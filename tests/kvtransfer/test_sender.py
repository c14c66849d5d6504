"""Group C of bad inputs at the sending machine: a receiver that is wrong or lies gets no block, and each slot it lent back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.frames import DIGEST_OFF, DIGEST_SUM64, blocks_per_slot, slot_bytes_for
from kvtransfer.protocol import Send
from kvtransfer.sender import LentSlot, Outcome, Piece, Sender, Shipment
from splitfire.core.layout import KvLayout
from splitfire.core.wire import layout_to_wire
from splitfire.v1 import fleet_pb2, kv_pb2
from tests.kvtransfer.fakes import LAYOUT

ID, TOKEN = b"a" * 16, b"t" * 16
NUM_TOKENS, NUM_BLOCKS = 70, 5
SLOT_BYTES = slot_bytes_for(LAYOUT.block_bytes)


class Bench:
    """A sender whose prompt is computed, with a port that writes everything down."""

    def __init__(self, num_tokens: int = NUM_TOKENS, *, is_computed: bool = True) -> None:
        self.said: list[str] = []
        self.sent: list[kv_pb2.KvMessage] = []
        self.pieces: list[tuple[LentSlot, Piece]] = []
        self.voids: list[LentSlot] = []
        self.ends: list[tuple[Outcome, str]] = []
        self.num_granted = 0
        self.per_payload: int | None = None
        self.sender = Sender(Shipment(ID, TOKEN, num_tokens, LAYOUT), self, lambda: 0.0)
        self.sender.offer()
        if is_computed:
            self.sender.computed(num_tokens)

    @property
    def num_asked(self) -> int:
        return sum(m.want.num_slots for m in self.sent)

    def send(self, message: kv_pb2.KvMessage) -> None:
        assert not self.ends, "the last call was the last"
        self.said.append(str(message.WhichOneof("body")))
        self.sent.append(message)

    def send_piece(self, slot: LentSlot, piece: Piece) -> None:
        self.pieces.append((slot, piece))

    def send_void(self, slot: LentSlot) -> None:
        self.voids.append(slot)

    def blocks_per_payload(self, layout: KvLayout, receiver_slot_bytes: int) -> int:
        return self.per_payload or blocks_per_slot(min(SLOT_BYTES, receiver_slot_bytes), layout.block_bytes)

    def granted(self) -> None:
        self.num_granted += 1

    def closed(self, outcome: Outcome, reason: str) -> None:
        self.ends.append((outcome, reason))

    def hear(self, **body: object) -> None:
        self.sender.on_message(kv_pb2.KvMessage(transfer_id=ID, **body))  # type: ignore[arg-type]

    def grant(self, **changes: object) -> None:
        right: dict[str, object] = {
            "first_block": 0, "kv_format": layout_to_wire(LAYOUT), "slot_bytes": SLOT_BYTES, "digest_algorithm": DIGEST_SUM64,
        }  # fmt: skip
        self.hear(grant=kv_pb2.Grant(**{**right, **changes}))  # type: ignore[arg-type]

    def lend(self, *slots: tuple[int, int]) -> None:
        self.hear(slots=kv_pb2.Slots(slots=[kv_pb2.Slot(index=i, generation=g) for i, g in slots]))

    def assert_aborted(self, because: str) -> None:
        [(outcome, reason)] = self.ends
        assert outcome is Outcome.ABORTED and because in reason
        assert self.said[-1] == "abort" and not self.sender.is_open


def test_what_was_granted_is_sent_in_order_and_committed() -> None:
    bench = Bench()
    bench.grant(first_block=1)
    bench.lend((0, 1), (1, 1))
    bench.sender.finish([kv_pb2.FirstToken(token_id=1)])
    bench.lend((2, 1), (0, 2))
    assert [piece for _, piece in bench.pieces] == [Piece(i, i + 1) for i in range(1, NUM_BLOCKS)]
    assert bench.said == ["offer", "want", "commit"]
    bench.hear(received=kv_pb2.Received())
    assert bench.ends == [(Outcome.RECEIVED, "")] and not bench.voids


def tensor_parallel() -> fleet_pb2.KvFormat:
    kv_format = layout_to_wire(LAYOUT)
    kv_format.tp_size = 2
    return kv_format


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"kv_format": layout_to_wire(replace(LAYOUT, num_layers=3))}, "does not fit the offer"),  # B76
        ({"kv_format": layout_to_wire(replace(LAYOUT, num_kv_heads=1))}, "does not fit the offer"),
        ({"kv_format": layout_to_wire(replace(LAYOUT, head_dim=2**31))}, "does not fit the offer"),  # B73
        ({"kv_format": layout_to_wire(replace(LAYOUT, block_size=17))}, "does not fit the offer"),
        ({"kv_format": layout_to_wire(replace(LAYOUT, dtype="fp64"))}, "does not fit the offer"),  # B86
        ({"kv_format": layout_to_wire(replace(LAYOUT, dtype="x" * 50_000))}, "does not fit the offer"),
        ({"kv_format": tensor_parallel()}, "does not fit the offer"),
        ({"kv_format": fleet_pb2.KvFormat()}, "does not fit the offer"),
        ({"digest_algorithm": 0}, "does not fit the offer"),  # B74: unknown
        ({"digest_algorithm": 7}, "does not fit the offer"),
        ({"digest_algorithm": 2**32 - 1}, "does not fit the offer"),
        ({"first_block": NUM_BLOCKS + 1}, "does not fit the offer"),  # B71
        ({"first_block": 2**32 - 1}, "does not fit the offer"),
        ({"slot_bytes": 0}, "does not fit a slot"),  # B72
        ({"slot_bytes": SLOT_BYTES - 1}, "does not fit a slot"),
    ],
)
def test_a_grant_that_does_not_fit_the_offer_gets_no_block(changes: dict[str, object], because: str) -> None:
    bench = Bench()
    bench.grant(**changes)
    bench.assert_aborted(because)
    assert not bench.pieces and not bench.num_granted


def test_a_digest_that_is_off_is_the_receivers_to_ask_for() -> None:
    bench = Bench()
    bench.grant(digest_algorithm=DIGEST_OFF)
    assert bench.sender.digest_algorithm == DIGEST_OFF and bench.said == ["offer", "want"]


def test_a_receiver_that_has_everything_is_sent_nothing() -> None:
    bench = Bench()
    bench.grant(first_block=NUM_BLOCKS)
    bench.sender.finish([kv_pb2.FirstToken(token_id=1)])
    assert bench.said == ["offer", "commit"] and bench.sender.state is Send.COMMITTED


def test_a_slot_larger_than_any_memory_is_filled_as_far_as_ours_go() -> None:
    """B73."""
    bench = Bench()
    bench.grant(slot_bytes=2**32 - 1)
    assert bench.sent[-1].want.num_slots == NUM_BLOCKS


@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(1, 60), max_size=8))
def test_small_chunks_share_payloads_and_every_block_goes_once(num_blocks: int, per_payload: int, chunks: list[int]) -> None:
    """Less than half a payload waits for the next chunk, the end for nothing."""
    bench = Bench(num_blocks * LAYOUT.block_size, is_computed=False)
    bench.per_payload = per_payload
    bench.grant()
    tokens = 0
    for chunk in chunks:
        tokens = min(tokens + chunk, num_blocks * LAYOUT.block_size)
        before = bench.num_asked
        bench.sender.computed(tokens)
        ready = tokens // LAYOUT.block_size
        waiting = ready - bench.sender._num_planned
        assert 0 <= 2 * waiting < per_payload or (waiting == 0 and ready == num_blocks)
        assert bench.num_asked - before <= -(-ready // per_payload)
    bench.sender.computed(num_blocks * LAYOUT.block_size)
    bench.lend(*((i, 1) for i in range(bench.num_asked)))
    blocks = [block for _, piece in bench.pieces for block in range(piece.start, piece.end)]
    assert blocks == list(range(num_blocks))
    assert all(piece.end - piece.start <= per_payload for _, piece in bench.pieces)


def test_slots_nobody_asked_for_come_back_empty_and_end_the_transfer() -> None:
    bench = Bench()
    bench.lend((0, 1), (1, 1))
    bench.assert_aborted("SLOTS is not possible")
    assert bench.voids == [LentSlot(0, 1), LentSlot(1, 1)] and not bench.pieces


def test_more_slots_than_were_asked_for_are_filled_with_nothing() -> None:
    bench = Bench()
    bench.grant()
    bench.lend(*((i, 1) for i in range(NUM_BLOCKS + 3)))
    assert len(bench.pieces) == NUM_BLOCKS
    assert bench.voids == [LentSlot(i, 1) for i in range(NUM_BLOCKS, NUM_BLOCKS + 3)]
    assert not bench.ends, "it may have asked for them before a revoke"


@pytest.mark.parametrize("slot", [(2**32 - 1, 2**32 - 1), (0, 0)])
def test_any_numbers_of_a_slot_are_only_names(slot: tuple[int, int]) -> None:
    """B70: what does not fit 32 bits cannot even be said."""
    bench = Bench()
    bench.grant()
    bench.lend(slot)
    assert bench.pieces[0][0] == LentSlot(*slot)
    with pytest.raises(ValueError, match="out of range"):
        kv_pb2.Slot(generation=2**32)


def test_a_second_grant_ends_the_transfer() -> None:
    bench = Bench()
    bench.grant()
    bench.grant()
    bench.assert_aborted("GRANT is not possible")
    bench = Bench()
    bench.grant()
    bench.hear(revoke=kv_pb2.Revoke())
    bench.grant(first_block=3)
    assert bench.num_granted == 2 and bench.said == ["offer", "want", "stopped", "want"]


@pytest.mark.parametrize("is_granted", [False, True])
def test_received_before_the_commit_is_no_receipt(is_granted: bool) -> None:
    """The blocks are still needed: whoever says so has not got them all."""
    bench = Bench()
    if is_granted:
        bench.grant()
        bench.lend(*((i, 1) for i in range(NUM_BLOCKS)))
    bench.hear(received=kv_pb2.Received())
    bench.assert_aborted("RECEIVED is not possible")


@pytest.mark.parametrize("body", ["offer", "want", "commit", "stopped"])
def test_a_senders_word_is_none_for_a_sender(body: str) -> None:
    bench = Bench()
    bench.hear(**{body: getattr(kv_pb2, body.capitalize())()})
    bench.assert_aborted("is not a receiver's word")


@pytest.mark.parametrize(("body", "outcome"), [("refuse", Outcome.REFUSED), ("abort", Outcome.ABORTED_BY_PEER)])
def test_the_end_is_told_once_whatever_comes_after(body: str, outcome: Outcome) -> None:
    bench = Bench()
    bench.hear(**{body: getattr(kv_pb2, body.capitalize())(reason="test")})
    bench.sender.abort("test")
    bench.sender.computed(NUM_TOKENS)
    bench.sender.finish([])
    assert bench.ends == [(outcome, "test")]
