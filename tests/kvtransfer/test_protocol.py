"""The two tables: complete, closed, and the same as the drawing in docs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtransfer.protocol import RECEIVER, SENDER, Recv, RecvEvent, Send, SendEvent, describe
from kvtransfer.ring import MAX_QUARANTINED, Ring, SlotState
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
    for state in (Send.DONE, Send.REFUSED, Send.ABORTED):
        for event in SendEvent:
            with pytest.raises(IllegalTransition):
                advance(SENDER, state, event)


def test_a_slot_is_lent_with_a_new_generation_each_time() -> None:
    ring = Ring(2, 64, lambda size: memoryview(bytearray(size)))
    seen = set()
    for _ in range(5):
        slot = ring.lend()
        assert slot is not None
        assert (slot.index, slot.generation) not in seen
        seen.add((slot.index, slot.generation))
        ring.give_back(slot)
        ring.give_back(slot)  # late news changes nothing
    assert ring.num_lent == 0


def test_a_quarantined_slot_never_comes_back_and_is_replaced_a_bounded_number_of_times() -> None:
    ring = Ring(1, 64, lambda size: memoryview(bytearray(size)))
    indices = set()
    while (slot := ring.lend()) is not None:
        indices.add(slot.index)
        ring.quarantine(slot)
        ring.give_back(slot)
        assert slot.state is SlotState.QUARANTINED
    assert len(indices) == MAX_QUARANTINED
    assert ring.is_exhausted
