"""What a worker measures and whom it tells: when two meet, when a router asks, and the last word only."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.memory import Hub
from kvtransfer.peers import PeerAddress
from splitfire.core.hashing import BlockHash
from splitfire.engine.engine import Engine
from splitfire.engine.updates import EngineLoad
from splitfire.worker.job import Replies
from splitfire.worker.load import LoadReporter, OpenJobs
from splitfire.worker.machine import copy_rate
from splitfire.worker.pairs import PairMeasurer
from splitfire.worker.tally import HandoffTally

ROUTER = cast(Replies, object())


class Idle:
    """As much of an engine as a reporter asks."""

    def load(self) -> EngineLoad:
        return EngineLoad(10, 10, 0, 0, 0, 0.0, 0.0)

    def take_cache_changes(self) -> Mapping[BlockHash, bool]:
        return {}

    def cached_names(self) -> Sequence[BlockHash]:
        return ()


@dataclass
class Scene:
    measurer: PairMeasurer
    reporter: LoadReporter
    peer: PeerAddress
    other: TransferAgent
    hub: Hub


@asynccontextmanager
async def two_that_know_each_other() -> AsyncIterator[Scene]:
    hub = Hub()
    agents = [
        TransferAgent(hub.create(), secrets.token_bytes(16), b"F" * 32, AgentOptions(2, 4, slot_bytes=64 << 10)) for _ in range(2)
    ]
    addresses = [PeerAddress(f"w{i}", agent.incarnation, agent.transport.address) for i, agent in enumerate(agents)]
    for agent in agents:
        agent.start()
    agents[0].meet(addresses[1])
    agents[1].meet(addresses[0])
    jobs = OpenJobs(lambda _id: False, lambda _ids: 0)
    reporter = LoadReporter(cast(Engine, Idle()), agents[0], jobs, lambda: False)
    yield Scene(PairMeasurer(agents[0], 1e10, reporter.add_pair), reporter, addresses[1], agents[1], hub)
    for agent in agents:
        assert agent.num_held_slots == 0
        agent.close()


async def until(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.001)


def test_a_pair_is_measured_when_two_meet_and_again_when_a_router_asks() -> None:
    async def scene() -> None:
        async with two_that_know_each_other() as at:
            at.measurer.meet(at.peer, is_same_host=True)
            at.measurer.meet(at.peer, is_same_host=True)  # a second router introduces it
            await until(lambda: at.reporter.pairs)
            [first] = at.reporter.pairs
            at.measurer.measure(at.peer.incarnation)
            await until(lambda: at.reporter.pairs != [first])
            [second] = at.reporter.pairs
            assert second.measured_at > first.measured_at
            wire = second.to_wire(second.measured_at + 3.0)
            assert (wire.age_s, wire.memcpy_bytes_per_s, wire.peer_incarnation) == (3.0, 1e10, at.peer.incarnation)
            assert 0 < wire.round_trip_s <= wire.round_trip_p99_s

    asyncio.run(scene())


def test_a_peer_that_is_not_here_is_not_measured() -> None:
    async def scene() -> None:
        async with two_that_know_each_other() as at:
            at.measurer.measure(b"nobody")
            at.measurer.meet(at.peer, is_same_host=True)
            at.measurer.part(at.peer.incarnation)  # while it is measured
            at.measurer.measure(at.peer.incarnation)
            await until(lambda: at.other.num_held_slots == 0)
            await asyncio.sleep(0.05)
            assert at.reporter.pairs == []

    asyncio.run(scene())


def test_a_router_that_does_not_read_costs_one_measurement_a_peer() -> None:
    async def scene() -> None:
        async with two_that_know_each_other() as at:
            with at.reporter.stream(ROUTER) as stream:
                reports = stream.messages()
                assert [(await anext(reports)).WhichOneof("report") for _ in range(2)] == ["load", "cache_events"]
                at.measurer.meet(at.peer, is_same_host=True)
                for _ in range(3):
                    seen = at.reporter.pairs
                    at.measurer.measure(at.peer.incarnation)
                    await until(lambda seen=seen: at.reporter.pairs != seen)  # type: ignore[misc]
                kinds = [(await anext(reports)).WhichOneof("report") for _ in range(2)]
                assert kinds == ["pair", "load"]

    asyncio.run(scene())


def test_a_pair_is_told_again_to_a_router_that_comes_to_know_the_peer_later() -> None:
    """It attaches two workers that come back in the wrong order, and drops what the first says of the second."""

    async def scene() -> None:
        async with two_that_know_each_other() as at:
            at.reporter.repeat_pair(at.peer.incarnation)  # nothing to tell yet
            at.measurer.meet(at.peer, is_same_host=True)
            await until(lambda: at.reporter.pairs)
            with at.reporter.stream(ROUTER) as stream:
                reports = stream.messages()
                assert [(await anext(reports)).WhichOneof("report") for _ in range(3)] == ["pair", "load", "cache_events"]
                at.reporter.repeat_pair(at.peer.incarnation)
                assert [(await anext(reports)).WhichOneof("report") for _ in range(2)] == ["pair", "load"]

    asyncio.run(scene())


def test_memcpy_is_measured_on_the_same_bytes() -> None:
    assert 1e8 < copy_rate(1 << 20) < 1e13


def test_what_a_peer_says_makes_no_new_outcomes() -> None:
    tally = HandoffTally()
    for reason in ("withdrawn", "no_room", "kv_digest_mismatch", "x" * 100, "y" * 100):
        tally.not_received(reason)
    tally.received(7)
    assert sorted(ending.outcome for ending in tally.endings) == ["corrupt", "failed", "no_room", "received", "withdrawn"]
    assert sum(tally.endings.values()) == 6
    assert list(tally.num_bytes.values()) == [7]
