"""Prompts without a grant hold at most half of prefill's pool, and of that a fair share for each decode worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_svc.gate import Claim, HoldGate


def claim(key: int, blocks: int, peer: bytes = b"d0", priority: int = 0) -> Claim:
    return Claim(key, peer, blocks, priority)


def test_prompts_start_until_half_the_pool_is_held_without_a_grant() -> None:
    gate = HoldGate(100)
    for key in range(8):
        gate.enter(claim(key, 10))
    assert gate.passing() == [0, 1, 2, 3, 4]
    assert gate.passing() == []
    gate.leave(2)  # granted
    assert gate.passing() == [5]
    assert gate.num_waiting == 2


def test_a_decode_worker_without_room_stops_its_own_prompts_alone() -> None:
    gate = HoldGate(100)
    for key in range(5):
        gate.enter(claim(key, 10, b"full"))
    assert len(gate.passing()) == 5
    gate.enter(claim(10, 10, b"free"))
    assert gate.passing() == [], "half the pool is held"
    gate.leave(0)
    gate.enter(claim(11, 10, b"full"))
    assert gate.passing() == [10], "its share is 25, the other holds 40"
    gate.leave(10)
    gate.enter(claim(12, 10, b"free"))
    assert gate.passing() == [12]


def test_a_prompt_larger_than_its_share_goes_alone() -> None:
    gate = HoldGate(100)
    gate.enter(claim(0, 90))
    assert gate.passing() == [0]
    gate.enter(claim(1, 1))
    assert gate.passing() == []
    gate.leave(0)
    assert gate.passing() == [1]


def test_the_first_of_a_decode_worker_may_exceed_its_share_but_not_half_the_pool() -> None:
    gate = HoldGate(100)
    gate.enter(claim(0, 5, b"d1"))
    gate.passing()
    gate.enter(claim(1, 46, b"d0"))
    assert gate.passing() == [], "51 of 50 blocks"
    gate.enter(claim(2, 45, b"d2"))
    assert gate.passing() == [2], "its share is 16"


@pytest.mark.parametrize("peer", [b"small", b"large"])
def test_a_large_prompt_is_passed_by_a_bounded_number_of_small_ones(peer: bytes) -> None:
    """Small ones, of another decode worker and of its own, come as fast as others are granted."""
    gate = HoldGate(100)
    running = [claim(-i, 10, peer) for i in range(1, 3)]
    for small in running:
        gate.enter(small)
    gate.passing()
    gate.enter(claim(0, 45, b"large"))
    for key in range(1, 1000):
        gate.enter(claim(key, 10, peer))
        started = gate.passing()
        if 0 in started:
            break
        running += [claim(k, 10, peer) for k in started]  # type: ignore[arg-type]
        if running:
            gate.leave(running.pop(0).key)
    assert 30 < key < 40


def test_higher_classes_start_first() -> None:
    gate = HoldGate(100)
    gate.enter(claim(0, 50))
    gate.passing()
    for key, priority in ((1, 0), (2, 4), (3, 2)):
        gate.enter(claim(key, 50, priority=priority))
    started = []
    for last in (0, 2, 3):
        gate.leave(last)
        started += gate.passing()
    assert started == [2, 3, 1]


def test_a_prompt_that_lost_its_hand_off_counts_again() -> None:
    gate = HoldGate(100)
    gate.enter(claim(0, 40))
    gate.passing()
    gate.leave(0)  # granted
    gate.hold(claim(0, 40, b"d1"))  # and lost
    gate.enter(claim(1, 20, b"d1"))
    assert gate.passing() == []
    gate.leave(0)
    assert gate.passing() == [1]


def test_a_redirect_of_a_prompt_that_waits_keeps_its_place() -> None:
    gate = HoldGate(20)
    for key in (0, 1, 2):
        gate.enter(claim(key, 10))
    assert gate.passing() == [0]
    gate.hold(claim(1, 10, b"d1"))
    gate.leave(0)
    assert gate.passing() == [1]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["enter", "leave", "hold"]), st.integers(0, 9), st.integers(1, 60), st.sampled_from([b"a", b"b", b"c"])
        )
    )
)
def test_nobody_waits_for_ever_and_the_bound_holds(steps: list[tuple[str, int, int, bytes]]) -> None:
    """Whatever happened before: when everything that is held is granted, everything that waits starts, one after another."""
    gate, held, known = HoldGate(80), dict[int, int](), set[int]()
    for kind, key, blocks, peer in steps:
        if kind == "enter" and key not in known:
            gate.enter(claim(key, blocks, peer))
            known.add(key)
        elif kind == "leave":
            gate.leave(key)
            held.pop(key, None)
            known.discard(key)
        passed = gate.passing()
        held.update({k: gate._held[k].num_blocks for k in passed})  # type: ignore[misc]
        assert not passed or sum(held.values()) <= 40 or len(held) == 1
    while gate.num_waiting:
        for key in list(held):
            gate.leave(key)
        held = dict.fromkeys(gate.passing(), 0)  # type: ignore[arg-type]
        assert held
