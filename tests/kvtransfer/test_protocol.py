"""The two tables: complete, closed, and the same as the drawing in docs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtransfer.protocol import RECEIVER, SENDER, Recv, RecvEvent, Send, SendEvent, describe
from kvtransfer.ring import MAX_RETIRED, Ring, RingOptions, SlotState
from kvtransfer.transport import SlotMemory
from splitfire.core.errors import Unavailable
from splitfire.core.lifecycle import IllegalTransition, advance

DOCS = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


def test_the_drawing_in_docs_is_printed_from_the_tables() -> None:
    assert DOCS.read_text() == describe(), "run: python -m kvtransfer.protocol > docs/protocol.md"


def test_every_state_and_event_is_used() -> None:
    assert set(SENDER) == set(Send)
    assert set(RECEIVER) == set(Recv)
    assert {event for following in SENDER.values() for event in following} == set(SendEvent)
    assert {event for following in RECEIVER.values() for event in following} == set(RecvEvent)


def test_an_abort_is_possible_in_every_open_state() -> None:
    assert all(SendEvent.ABORT in following for following in SENDER.values() if following)
    assert all(RecvEvent.ABORT in f or state is Recv.DRAINING for state, f in RECEIVER.items() if f)


def test_nothing_follows_an_end() -> None:
    for state in (Send.DONE, Send.REFUSED, Send.REDIRECTED, Send.ABORTED):
        for event in SendEvent:
            with pytest.raises(IllegalTransition):
                advance(SENDER, state, event)


def make_ring(slots_per_peer: int, max_peers: int = 2) -> Ring:
    return Ring(RingOptions(slots_per_peer, 64, max_peers), lambda size: SlotMemory(memoryview(bytearray(size))))


def test_a_slot_is_lent_with_a_new_generation_each_time() -> None:
    ring = make_ring(2)
    segment = ring.segment(b"peer")
    seen = set()
    for _ in range(5):
        slot = segment.lend()
        assert slot is not None
        assert (slot.index, slot.generation) not in seen
        seen.add((slot.index, slot.generation))
        segment.give_back(slot)
        segment.give_back(slot)  # late news changes nothing
    assert ring.num_lent == 0 and segment.num_slots == 2


def test_a_retired_slot_never_comes_back_and_is_replaced_a_bounded_number_of_times() -> None:
    ring = make_ring(1)
    segment = ring.segment(b"peer")
    indices = set()
    while (slot := segment.lend()) is not None:
        indices.add(slot.index)
        segment.retire(slot)
        segment.give_back(slot)
        assert slot.state is SlotState.RETIRED
    assert len(indices) == MAX_RETIRED
    assert ring.is_exhausted


def test_a_peer_that_takes_all_its_slots_leaves_the_others_theirs() -> None:
    ring = make_ring(2)
    greedy, other = ring.segment(b"greedy"), ring.segment(b"other")
    while greedy.lend() is not None:
        pass
    assert other.lend() is not None
    with pytest.raises(Unavailable, match="limit --max-peers 2"):
        ring.segment(b"third")


def test_the_memory_of_lost_peers_serves_the_next_and_what_was_lent_does_not() -> None:
    """A hundred peers come and go; each dies with one operation outstanding in every other life."""
    ring = make_ring(4)
    lost: set[int] = set()
    for life in range(100):
        segment = ring.segment(b"peer")
        lent = [slot for slot in (segment.lend(), segment.lend()) if slot is not None]
        assert len(lent) == 2 and not lost.intersection(slot.index for slot in lent)
        segment.give_back(lent[0])
        if life % 2:
            segment.give_back(lent[1])
        else:
            lost.add(lent[1].index)
        ring.drop(b"peer")
        segment.give_back(lent[1])  # late news of a segment that is gone
    assert ring.num_retired == len(lost) == 50
    assert ring.num_bytes == 64 * (4 + 50)
    assert ring.num_lent == 0
