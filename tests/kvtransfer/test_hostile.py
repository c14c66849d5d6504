"""Group C of bad inputs at a whole agent: what a hostile or stalled worker leaves behind is bounded, and time takes it away.

The scenes are those of fuzz.py: one transfer from and one to the hostile worker, one each with an honest one beside them.
"""

from __future__ import annotations

import pytest

from kvtransfer.expectation import Expectation
from kvtransfer.sender import Outcome
from splitfire.core import limits
from splitfire.v1 import kv_pb2
from tests.kvtransfer.fakes import FINGERPRINT, LAYOUT, FakeSink
from tests.kvtransfer.fuzz import (
    BESIDE_IN,
    BESIDE_OUT,
    INCOMING,
    NUM_BLOCKS,
    NUM_TOKENS,
    OUTGOING,
    RIGHT_COMMIT,
    RIGHT_GRANT,
    RIGHT_OFFER,
    RIGHT_WANT,
    TOKEN,
    UNKNOWN,
    World,
    bugs_are_caught,
)

ABORT = ("abort", kv_pb2.Abort(reason="test"))


def say(world: World, transfer_id: bytes, *what: tuple[str, object]) -> None:
    for one in what:
        world.say(transfer_id, one, [], False)


def sink_of(world: World, transfer_id: bytes) -> FakeSink:
    sink = world.ends[transfer_id][1]
    assert sink is not None
    return sink


@pytest.mark.parametrize("is_certain", [False, True])
def test_with_a_worker_that_says_nothing_every_transfer_ends(is_certain: bool) -> None:
    world = World(is_certain)
    with bugs_are_caught(world.network):
        world.finish()
    source = world.ends[OUTGOING][0]
    assert source is not None and (source.outcome, source.reason) == (Outcome.ABORTED, "deadline")


def test_an_offer_nobody_expects_is_parked_for_a_moment_and_then_unknown() -> None:
    """B75."""
    world = World(True)
    say(world, UNKNOWN, RIGHT_OFFER)
    world.network.wait(limits.OFFER_PARKED_S - 0.1)
    assert world.agent._incoming.num_parked == 1
    world.network.wait(0.2)
    assert world.agent._incoming.num_parked == 0
    assert world.agent.dropped["unknown_transfer"] == 1
    world.finish()


def test_an_offer_of_one_worker_is_none_of_another() -> None:
    """B75: the router named the honest one; who gets his word in first has not got the transfer."""
    world = World(True)
    say(world, UNKNOWN, RIGHT_OFFER)
    world.network.deliver()
    sink, honest = FakeSink(9), world.honest
    peer = world.agent._peers.known(honest.incarnation)
    assert peer is not None
    world.agent.expect(Expectation(UNKNOWN, TOKEN, honest.incarnation, NUM_TOKENS, LAYOUT, FINGERPRINT[:8]), peer.address, sink)
    assert world.agent._incoming.num_parked == 0 and not sink.holds_blocks
    say(world, UNKNOWN, RIGHT_OFFER, RIGHT_WANT)
    assert world.agent.dropped["not_owner"] == 2 and not sink.holds_blocks and not sink.end


@pytest.mark.parametrize("what", [RIGHT_OFFER, RIGHT_WANT, RIGHT_COMMIT, RIGHT_GRANT, ABORT])
def test_a_transfer_that_is_over_cannot_be_begun_again(what: tuple[str, object]) -> None:
    """B75: finished, and its id reused."""
    world = World(True)
    say(world, INCOMING, RIGHT_OFFER, ABORT)
    world.network.deliver()
    sink = sink_of(world, INCOMING)
    assert sink.end == "test" and not sink.holds_blocks
    say(world, INCOMING, what)
    world.network.wait(limits.OFFER_PARKED_S + 0.1)
    assert world.agent.dropped["unknown_transfer"] == 1
    assert not sink.holds_blocks and world.agent._incoming.num_parked == 0
    world.finish()


def test_a_hundred_thousand_offers_take_the_room_of_256() -> None:
    """B81: without data, and without the router's word. Workers that were named are bounded by the jobs a worker takes."""
    world = World(True)
    for number in range(100_000):
        say(world, number.to_bytes(16, "big"), RIGHT_OFFER)
        assert world.agent._incoming.num_parked <= limits.MAX_PARKED_OFFERS
    assert world.agent.dropped["offers_parked"] == 100_000 - limits.MAX_PARKED_OFFERS
    assert world.agent.num_held_slots == 0
    world.finish()


@pytest.mark.parametrize(
    "kind", ["want", "commit", "abort", "stopped", "grant", "slots", "received", "revoke", "refuse", "redirect"]
)
def test_words_about_the_transfer_of_another_pair_are_dropped(kind: str) -> None:
    """B82."""
    world = World(True)
    world.network.deliver(9)  # both are in the middle
    body = getattr(kv_pb2, {"redirect": "RedirectOffer"}.get(kind, kind.capitalize()))()
    for transfer_id in (BESIDE_IN, BESIDE_OUT):
        say(world, transfer_id, (kind, body))
    assert world.agent.dropped["not_owner"] == 2
    world.finish()


def test_a_sender_that_stalls_in_the_middle_loses_its_blocks_and_then_its_slots() -> None:
    """B80: its slots are lent, and nothing comes. What it says meanwhile of other things does not count."""
    world = World(False)
    sink = sink_of(world, INCOMING)
    say(world, INCOMING, RIGHT_OFFER, RIGHT_WANT)
    world.network.deliver()
    world.send(0, 0, [], [])
    world.network.deliver()
    assert sink.written.keys() == {0} and world.agent.num_held_slots > 0
    for _ in range(int(limits.PROGRESS_S / 0.5) + 1):
        say(world, UNKNOWN, ("ping", kv_pb2.Ping()))
        world.network.wait(0.5)
        world.agent.tick()
    assert sink.end == "deadline" and not sink.holds_blocks
    world.finish()
    assert world.agent.receive_ring.num_retired > 0, "UCX may write there still"


def test_a_sender_that_sends_a_block_at_a_time_is_slow_and_no_more() -> None:
    """B80: each block is progress."""
    world = World(True)
    sink = sink_of(world, INCOMING)
    say(world, INCOMING, RIGHT_OFFER, RIGHT_WANT)
    for block in range(NUM_BLOCKS):
        world.network.deliver()
        world.network.wait(limits.PROGRESS_S - 0.1)
        world.send(block, block, [], [])
    world.network.deliver()
    say(world, INCOMING, RIGHT_COMMIT)
    sink.assert_right(NUM_BLOCKS)
    world.finish()
