"""What a worker tells of its prefix cache arrives: a router's index equals the pool, whatever the router misses or is slow to read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvtransfer.agent import TransferAgent
from router.prefix_index import CacheChange, PrefixIndex
from splitfire.core import limits
from splitfire.core.hashing import BlockHash, chain_root, hash_blocks, short_name, short_names
from splitfire.engine.blocks import BlockPool
from splitfire.engine.engine import Engine
from splitfire.engine.sequence import SeqId
from splitfire.engine.updates import EngineLoad
from splitfire.v1 import fleet_pb2
from splitfire.worker.cache_feed import MAX_PENDING, SNAPSHOT_EVERY_S, CacheFeed, CacheFeeds
from splitfire.worker.job import Job
from splitfire.worker.load import SETTLE_S, LoadReporter, OpenJobs
from tests.checkpoints import PICO
from tests.engines import ROOT_HASH, drain, load_model, make_engine, make_spec
from tests.rig import Rig, play

ROOT = chain_root(b"", b"model", "")
WORKER = b"w" * 16


class Source:
    """A pool as the engine shows it."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = BlockPool(num_blocks)
        self.take_cache_changes, self.cached_names = self.blocks.take_changes, self.blocks.names

    def run(self, tokens: Sequence[int]) -> None:
        """A sequence of one token a block comes, computes and goes."""
        names = hash_blocks(ROOT, tokens, 1)
        found = self.blocks.match(names)
        rest = self.blocks.allocate(len(names) - len(found))
        assert rest is not None
        for block_id, name in zip(rest, names[len(found) :], strict=True):
            self.blocks.commit(block_id, name, ROOT)
        self.blocks.release([*found, *rest])

    def load(self) -> EngineLoad:
        return EngineLoad(10, 10, 0, 0, 0, 0.0, 0.0, step_s=0.25, cached_blocks=self.blocks.num_indexed)


class Router:
    """Keeps an index of what one feed tells, and asks for a resync when something is missing."""

    def __init__(self, feed: CacheFeed) -> None:
        self.feed = feed
        self.index = PrefixIndex(1_000_000, lambda: 0.0)
        self.index.add(WORKER, 1_000_000, is_exact=True)

    def read(self, now: float) -> int:
        told = [*self.feed.messages(now)]
        for events in told:
            self.take(events)
        return len(told)

    def take(self, events: fleet_pb2.CacheEvents) -> None:
        assert events.ByteSize() <= 64 * 1024
        if not self.index.on_events(WORKER, change_of(events)):
            self.feed.resync()

    @property
    def held(self) -> set[int]:
        return self.index._workers[WORKER].held


def change_of(events: fleet_pb2.CacheEvents) -> CacheChange:
    return CacheChange(events.sequence, events.stored, events.removed, events.is_snapshot, events.is_last_page)


@pytest.mark.parametrize("seed", range(5))
def test_every_router_knows_what_is_cached(seed: int) -> None:
    draw, source = random.Random(seed), Source(20)
    feeds = CacheFeeds(source)
    routers, now = [Router(feeds.open())], 0.0
    for _ in range(200):
        now += 0.3
        source.run(draw.choices(range(3), k=draw.randrange(1, 9)))
        for router in draw.sample(routers, draw.randrange(len(routers) + 1)):
            if draw.random() < 0.1:
                [*router.feed.messages(now)]  # lost
            router.read(now)
        if len(routers) < 3 and draw.random() < 0.05:
            routers.append(Router(feeds.open()))
    assert len(routers) == 3
    source.run([7])
    for router in routers:
        router.read(now + 2 * SNAPSHOT_EVERY_S)
        router.read(now + 4 * SNAPSHOT_EVERY_S)
        assert router.held == set(short_names(source.blocks.names()))
        assert router.read(now + 9.0) == 0, "nothing changed, nothing is told"


def test_a_large_cache_is_told_in_pages() -> None:
    source = Source(20_000)
    source.run(range(20_000))
    assert source.take_cache_changes() is None, "too many to keep for nobody"
    router = Router(CacheFeeds(source).open())
    told = [*router.feed.messages(0.0)]
    assert [(e.sequence, e.is_snapshot, e.is_last_page, len(e.stored)) for e in told] == [
        (0, True, False, 8000),
        (1, True, False, 8000),
        (2, True, True, 4000),
    ]
    for events in told:
        router.take(events)
    assert len(router.held) == 20_000
    assert [*told[0].stored[:2]] == [short_name(name) for name in hash_blocks(ROOT, range(2), 1)]


def test_an_empty_cache_is_told_too() -> None:
    [events] = CacheFeeds(Source(4)).open().messages(0.0)
    assert (events.is_snapshot, events.is_last_page, len(events.stored)) == (True, True, 0)


def test_two_snapshots_never_run_into_one_another() -> None:
    """A router that lost a page asks while others are on their way; and one that asks all the time gets one a second."""
    source = Source(20_000)
    source.run(range(20_000))
    router = Router(CacheFeeds(source).open())
    under_way = router.feed.messages(0.0)
    router.take(next(under_way))
    next(under_way)  # lost
    router.take(next(under_way))
    assert not [*under_way]
    source.run([99_999])
    assert router.read(SNAPSHOT_EVERY_S / 2) == 0
    assert router.read(SNAPSHOT_EVERY_S) == 3
    assert router.held == set(short_names(source.blocks.names()))


def test_a_router_that_does_not_read_costs_a_bounded_list() -> None:
    source = Source(4)
    feeds = CacheFeeds(source)
    slow, quick = Router(feeds.open()), Router(feeds.open())
    slow.read(0.0)
    quick.read(0.0)
    for name in range(MAX_PENDING // 1000 + 2):
        feeds_changes = {BlockHash(f"{name}-{i}".encode().ljust(32)): True for i in range(1000)}
        slow.feed.note(feeds_changes)
        assert len(slow.feed._pending) <= MAX_PENDING
    source.run([1, 2])
    assert quick.read(5.0) == 1
    assert slow.read(5.0) == 1
    assert slow.held == quick.held == set(short_names(source.blocks.names()))


@dataclass
class Jobs:
    """Of two routers, at a worker of which a test says who is still there."""

    here: set[int] = field(default_factory=set)
    missing: dict[int, int] = field(default_factory=dict)

    def owns(self, seq_id: SeqId) -> bool:
        return seq_id in self.here

    def num_missing(self, ids: Sequence[SeqId]) -> int:
        return sum(self.missing.get(seq_id, 0) for seq_id in ids)


def job(replies: object, part: int, seq_id: int, num_tokens: int, *choices: int) -> Job:
    members = [SimpleNamespace(spec=SimpleNamespace(seq_id=choice)) for choice in choices or (seq_id,)]
    spec = SimpleNamespace(seq_id=seq_id, num_tokens=num_tokens)
    return cast(Job, SimpleNamespace(replies=replies, part=part, spec=spec, members=lambda: members))


def test_a_router_is_told_of_the_others_share() -> None:
    one, two = cast(Any, object()), cast(Any, object())
    world = Jobs({1, 2, 31, 32, 4, 5}, {2: 30})
    jobs = OpenJobs(world.owns, world.num_missing)
    jobs.add(job(one, fleet_pb2.PART_PREFILL, 1, 1000))
    jobs.add(job(two, fleet_pb2.PART_PREFILL, 2, 100))
    jobs.add(job(two, fleet_pb2.PART_WHOLE, 3, 20, 31, 32))
    jobs.add(job(two, fleet_pb2.PART_DECODE, 4, 5000))
    jobs.add(job(two, fleet_pb2.PART_PREFILL, 5, 7))
    jobs.begun((SeqId(2), SeqId(77)))
    assert jobs.of_others(two) == (1, 1000)
    assert jobs.of_others(one) == (5, 30 + 20 + 7)
    world.here -= {31, 4, 5}
    assert jobs.of_others(one) == (2, 30 + 20)
    world.here.clear()
    assert jobs.of_others(one) == (0, 0) and not jobs._jobs


def test_tokens_still_to_be_computed_are_those_of_prompts_that_wait_or_run() -> None:
    engine = make_engine(load_model(PICO), num_blocks=32, chunk_tokens=64)
    first, second = make_spec([9] * 100, 5), make_spec([8] * 50, 5)
    engine.add(first)
    engine.add(second)
    assert engine.num_missing([first.seq_id, second.seq_id, SeqId(-1)]) == 150
    engine.step()
    left = [engine.num_missing([spec.seq_id]) for spec in (first, second)]
    assert engine.num_missing([first.seq_id, second.seq_id]) == sum(left)
    assert 150 - 64 <= sum(left) < 150, "a chunk less"
    engine.step()
    engine.step()
    assert engine.num_missing([first.seq_id, second.seq_id]) == 0, "they decode"
    drain(engine)


async def anext_of(messages: Any, kind: str) -> Any:
    while True:
        report = await anext(messages)
        if report.HasField(kind):
            return getattr(report, kind)


def make_reporter(source: Source) -> LoadReporter:
    agent = cast(TransferAgent, SimpleNamespace(incarnation=WORKER, num_held_slots=0))
    world = Jobs()
    return LoadReporter(cast(Engine, source), agent, OpenJobs(world.owns, world.num_missing), lambda: False)


def test_a_busy_cache_sends_no_more_than_twenty_messages_a_second_and_load_every_second() -> None:
    async def scene() -> None:
        source, loop = Source(8), asyncio.get_running_loop()
        reporter = make_reporter(source)
        with reporter.stream(cast(Any, None)) as stream:
            messages = stream.messages()
            kinds: list[str | None] = []
            began, num_sent = loop.time(), 0
            async with asyncio.timeout(20):
                while "load" not in kinds[2:]:
                    source.run([num_sent])
                    reporter.cache_may_have_changed()
                    kinds.append((await anext(messages)).WhichOneof("report"))
                    num_sent += 1
        took = loop.time() - began
        assert kinds[:2] == ["load", "cache_events"]
        assert took >= limits.REPORT_EVERY_S
        assert 3 <= kinds.count("cache_events") <= took / SETTLE_S + 1

    asyncio.run(scene())


def test_the_load_says_what_placement_needs() -> None:
    async def scene() -> None:
        source = Source(8)
        source.run([1, 2, 3])
        reporter = make_reporter(source)
        with reporter.stream(cast(Any, None)) as stream, reporter.stream(cast(Any, None)):
            load = await anext_of(stream.messages(), "load")
        assert (load.step_s, load.cached_blocks, load.num_routers) == (0.25, 3, 2)
        assert reporter._streams == [] and reporter.caches._open == []

    asyncio.run(scene())


def test_a_prompt_that_was_handed_over_is_known_at_both_workers() -> None:
    model = load_model(PICO)
    prompt = [i % 200 + 10 for i in range(100)]

    async def scene() -> None:
        rig = Rig(make_engine(model, num_blocks=32), make_engine(model, num_blocks=32))
        index = PrefixIndex(1000, lambda: 0.0)
        feeds: Mapping[bytes, CacheFeed] = {
            node.agent.incarnation: CacheFeeds(node.engine).open() for node in (rig.prefill, rig.decode)
        }
        for worker in feeds:
            index.add(worker, 32, is_exact=True)
        answer = rig.ask(prompt, 40)
        await rig.settle()
        for worker, feed in feeds.items():
            for events in feed.messages(0.0):
                assert index.on_events(worker, change_of(events))
        names = short_names(hash_blocks(ROOT_HASH, (*prompt, *answer.ids()), 32))
        prefill, decode = feeds
        assert index.depths(names) == {prefill: 3, decode: 4}, "decode made more of them"
        assert rig.decode.engine.load().cached_blocks == 4
        assert all({*node.engine.blocks._num_indexed} == {ROOT_HASH} for node in rig.nodes), (
            "whosever salt it was, that is the owner"
        )
        assert rig.decode.engine.load().step_s == 1e-9, "its clock stands still"
        rig.close()

    play(scene())
