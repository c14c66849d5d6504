"""A peer is gone when nobody knows it any more, not when one router lost sight of it."""

from __future__ import annotations

from splitfire.worker.roster import VOUCH_S, Roster

PEER = b"p" * 16


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_word_of_the_only_router_counts() -> None:
    roster = Roster(Clock())
    roster.up("a", PEER)
    assert roster.gone("a", PEER)


def test_one_of_two_routers_losing_it_costs_nothing() -> None:
    roster = Roster(Clock())
    roster.up("a", PEER)
    roster.up("b", PEER)
    assert not roster.gone("a", PEER)
    assert roster.gone("b", PEER)


def test_a_peer_outlives_a_router_that_restarts() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.up("a", PEER)
    roster.router_lost("a")
    clock.now = VOUCH_S - 1
    assert roster.expired() == []
    roster.up("a", PEER)
    clock.now = 10 * VOUCH_S
    assert roster.expired() == []


def test_a_peer_nobody_vouches_for_is_gone_after_a_while_and_told_once() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.up("a", PEER)
    roster.up("b", b"q" * 16)
    roster.router_lost("a")
    clock.now = VOUCH_S + 1
    assert roster.expired() == [PEER]
    assert roster.expired() == []
