"""The prefix index against brute force: whatever is lost on the way, it is wrong by a cache miss at most, and only until a resync."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix_index import CREDIT_S, CacheChange, PrefixIndex

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
PAGE = 3


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(max_blocks: int = 10_000, *exact: bytes, clock: Clock | None = None) -> PrefixIndex:
    index = PrefixIndex(max_blocks, clock or Clock())
    for worker in exact:
        index.add(worker, 1000, is_exact=True)
    return index


def chain(*path: int) -> list[int]:
    """Names of a prefix, as chained as hashes are: a place in a tree."""
    return [hash(("node", path[: i + 1])) & (1 << 64) - 1 for i in range(len(path))]


def by_brute_force(held: Mapping[bytes, set[int]], names: Sequence[int]) -> dict[bytes, int]:
    depths = {}
    for worker, blocks in held.items():
        depth = next((i for i, name in enumerate(names) if name not in blocks), len(names))
        if depth:
            depths[worker] = depth
    return depths


def pages(first: int, names: Sequence[int]) -> list[CacheChange]:
    """A snapshot, from sequence number `first` on."""
    cuts = range(0, max(len(names), 1), PAGE)
    return [CacheChange(first + i, names[at : at + PAGE], (), True, at == cuts[-1]) for i, at in enumerate(cuts)]


@given(
    st.lists(st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=4), max_size=80),
    st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_depths_are_those_of_brute_force(holdings: list[list[list[int]]], asked: list[list[int]]) -> None:
    index, held = make(), {}
    for i, prefixes in enumerate(holdings):  # more workers than bits in a machine word
        worker = i.to_bytes(16, "big")
        index.add(worker, 1000, is_exact=True)
        held[worker] = {name for path in prefixes for name in chain(*path)}
        assert index.on_events(worker, CacheChange(0, sorted(held[worker]), (), True, True))
    for path in asked:  # where one parts is where the next is looked for first
        assert index.depths(chain(*path)) == by_brute_force(held, chain(*path))


@given(st.lists(st.frozensets(st.integers(0, 11)), max_size=20), st.lists(st.integers(1, 12), max_size=4))
@settings(max_examples=100, deadline=None)
def test_holes_are_no_more_than_a_miss(holdings: list[frozenset[int]], lengths: list[int]) -> None:
    """Where the index lost a block of a prefix, who holds what follows is found as deep as that."""
    index, names = make(), chain(*range(12))
    for i, held in enumerate(holdings):
        index.add(bytes([i]) * 16, 1000, is_exact=True)
        index.on_events(bytes([i]) * 16, CacheChange(0, [names[at] for at in held], ()))
    for length in lengths:
        depths = index.depths(names[:length])
        assert {*depths} == {bytes([i]) * 16 for i, held in enumerate(holdings) if 0 in held}
        for worker, depth in depths.items():
            assert depth - 1 in holdings[worker[0]]


def test_a_worker_in_the_place_of_another_is_not_taken_for_it() -> None:
    """F59: also where so many hold a prefix that they are found all at once."""
    index, names = make(), chain(1, 2, 3)
    workers = [bytes([i]) * 16 for i in range(20)]
    for worker in workers[:12]:
        index.add(worker, 10, is_exact=True)
        index.on_events(worker, CacheChange(0, names, (), True, True))
    for old, new in zip(workers[:8], workers[12:], strict=True):
        index.depths(names)
        index.remove(old)
        index.add(new, 10, is_exact=True)
        index.on_events(new, CacheChange(0, names, (), True, True))
        assert old not in index.depths(names)
    assert index.depths(names) == dict.fromkeys(workers[8:], 3)


def test_a_long_prompt_takes_few_look_ups() -> None:
    index, names = make(100_000), chain(*range(375))
    for i in range(64):
        index.add(i.to_bytes(16, "big"), 1000, is_exact=True)
        depth = 300 if i == 7 else 30
        index.on_events(i.to_bytes(16, "big"), CacheChange(0, names[:depth], (), True, True))
    num_asked = 0

    class Counting(dict[int, int]):
        def get(self, *args: int) -> int:  # type: ignore[override]
            nonlocal num_asked
            num_asked += 1
            return super().get(*args)

    index._holders = Counting(index._holders)
    assert sorted(index.depths(names).values()) == [30] * 63 + [300]
    assert num_asked <= 20
    num_asked = 0
    assert sorted(index.depths([*names[:250], *chain(-1, -2)]).values()) == [30] * 63 + [250]
    assert num_asked <= 14, "it is known where prompts that begin so part"
    assert set(index.depths([*names[:10], *chain(-3)]).values()) == {10}, "but not taken for granted"


class Faulty:
    """A worker with a tree of prefixes, leaf-first eviction, and a stream to the router that loses, repeats and reorders."""

    def __init__(self, index: PrefixIndex, source: random.Random) -> None:
        self.index, self.random = index, source
        self.held: set[int] = set()
        self.children: dict[int, int] = {}
        self.paths: dict[int, tuple[int, ...]] = {}
        self.sent: list[CacheChange] = pages(0, [])
        self.num_sent, self.num_resyncs, self.num_faults = 1, 0, 0

    def change(self) -> None:
        stored, removed = [], []
        for _ in range(self.random.randrange(3)):
            path = tuple(self.random.choices((0, 1, 2), k=self.random.randrange(1, 6)))
            stored += [name for name in chain(*path) if name not in self.held]
            for i, name in enumerate(chain(*path)):
                self.paths[name] = path[: i + 1]
            self.held.update(stored)
        for _ in range(self.random.randrange(4)):
            parents = {chain(*self.paths[n][:-1])[-1] for n in self.held if len(self.paths[n]) > 1}
            leaves = sorted(self.held - parents - set(stored))
            if leaves:
                removed.append(self.random.choice(leaves))
                self.held.remove(removed[-1])
        self.sent.append(CacheChange(self.num_sent, stored, removed))
        self.num_sent += 1

    def deliver(self) -> None:
        if self.sent and not self.index.on_events(A, self.sent.pop(0)):
            self.num_resyncs += 1
            snapshot = pages(self.num_sent, sorted(self.held))
            self.num_sent += len(snapshot)
            self.sent += snapshot

    def fault(self) -> None:
        if not self.sent:
            return
        kind = self.random.randrange(3)
        self.num_faults += kind != 1  # what is repeated is dropped
        if kind == 0:
            self.sent.pop(0)
        elif kind == 1:
            self.sent.insert(self.random.randrange(len(self.sent) + 1), self.sent[0])
        else:
            self.sent.insert(self.random.randrange(len(self.sent)), self.sent.pop(0))


@given(st.randoms(use_true_random=False), st.lists(st.sampled_from("ccdddf"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_index_event_gap_resync(source: random.Random, steps: list[str]) -> None:
    """F60: lost, repeated and reordered events end in resyncs, at most one for each fault, and then in the truth."""
    index = make(10_000, A)
    worker = Faulty(index, source)
    for step in steps:
        {"c": worker.change, "d": worker.deliver, "f": worker.fault}[step]()
        assert set(index.depths(chain(0, 1))) <= {A}
    worker.change()  # what was lost last shows with the next message
    for _ in range(20 * (len(steps) + 2)):
        worker.deliver()
    assert not worker.sent, "resyncs without end"
    assert worker.num_resyncs <= worker.num_faults
    assert index._workers[A].held == worker.held
    assert index.num_blocks(A) == len(worker.held)
    asked = chain(*source.choices((0, 1, 2), k=6))
    assert index.depths(asked) == by_brute_force({A: worker.held}, asked)


def test_what_was_known_is_used_until_a_resync_is_complete() -> None:
    index, names, more = make(10_000, A), chain(1, 2, 3, 4, 5), chain(9, 8)
    index.on_events(A, CacheChange(0, names, (), True, True))
    assert not index.on_events(A, CacheChange(7, (), ()))
    first, *rest = pages(8, [*names[:2], *more])
    assert index.on_events(A, first)
    assert (index.depths(names), index.depths(more)) == ({A: 5}, {A: 1})
    for page in rest:
        assert index.on_events(A, page)
    assert (index.depths(names), index.depths(more), index.num_blocks(A)) == ({A: 2}, {A: 2}, 4)


def test_a_snapshot_that_lost_a_page_is_not_the_truth() -> None:
    index, names = make(10_000, A), chain(*range(9))
    index.on_events(A, CacheChange(0, names, (), True, True))
    first, _lost, last = pages(1, names)
    assert index.on_events(A, first)
    assert not index.on_events(A, last)
    assert index.num_blocks(A) == 9
    again = pages(4, names[:4])
    assert [index.on_events(A, page) for page in again] == [True, True]
    assert index.depths(names) == {A: 4}


def test_late_event_of_a_gone_worker_is_dropped() -> None:
    """F59: nobody is sent to a worker that is gone, and nothing is asked of it."""
    index, names = make(10_000, A, B), chain(1, 2, 3)
    for worker in (A, B):
        index.on_events(worker, CacheChange(0, names, (), True, True))
    index.remove(A)
    assert index.on_events(A, CacheChange(9, chain(4), ()))
    index.credit(A, chain(4))
    assert index.depths(names) == {B: 3}
    assert index.depths(chain(4)) == {} and index.num_blocks(A) == 0


def test_a_worker_that_comes_back_has_nothing_yet() -> None:
    """F59: a restart empties the cache; the bits of its old life are nobody's."""
    index, names = make(10_000, A), chain(*range(600))
    for life in range(50):
        index.on_events(A, CacheChange(0, names, (), True, True))
        assert index.depths(names) == {A: 600}
        index.remove(A)
        index.add(A, 1000, is_exact=True)
        index.add(bytes([life]) * 16, 10, is_exact=False)
        assert index.depths(names) == {}
        index.remove(bytes([life]) * 16)
    assert len(index._by_slot) < 12, "bits of the gone are used again"
    assert index._num_blocks < 3000


def test_what_was_sent_is_there_until_no_event_says_so() -> None:
    clock = Clock()
    index, names = make(10_000, A, clock=clock), chain(*range(8))
    index.credit(A, names)
    assert index.depths(names) == {A: 8}
    clock.now += CREDIT_S / 2
    index.on_events(A, CacheChange(0, names[:3], (), True, True))
    index.on_events(A, CacheChange(1, (), names[6:]))
    assert index.depths(names) == {A: 8}, "sent there after it was removed, for all we know"
    clock.now += CREDIT_S / 2
    assert index.depths(names) == {A: 3}
    assert index.num_blocks(A) == len(index._holders) == 3


def test_credits_of_a_full_worker_count() -> None:
    index = make()
    index.add(A, 4, is_exact=True)
    index.on_events(A, CacheChange(0, chain(1, 2, 3, 4), (), True, True))
    index.credit(A, chain(1, 2, 5))
    assert index.depths(chain(1, 2, 5)) == {A: 3}


def test_a_worker_that_tells_nothing_forgets_leaves_of_what_was_used_longest_ago() -> None:
    clock, index = Clock(), make()
    index.add(A, 6, is_exact=False)
    index.credit(A, chain(1, 2, 3))
    index.credit(A, chain(1, 9))
    index.credit(A, chain(4, 5, 6))
    assert index.num_blocks(A) == 6
    assert [index.depths(chain(*path)).get(A, 0) for path in ((1, 2, 3), (1, 9), (4, 5, 6))] == [2, 2, 3]
    clock.now += 100 * CREDIT_S
    assert index.depths(chain(4, 5, 6)) == {A: 3}
    assert index.on_events(A, CacheChange(5, chain(7), ())), "it said that it sends none"
    assert index.depths(chain(7)) == {}


def test_index_memory_bounded() -> None:
    """F61: never more than so many entries. What is only credited gives way to what is told, and then nothing comes in."""
    index = make(500, A)
    index.add(B, 10**6, is_exact=False)
    index.add(C, 10**6, is_exact=False)
    for i in range(3000):
        index.credit((B, C)[i % 2], chain(i, 0, 1))
        assert index._num_blocks <= 500
    assert index.depths(chain(2999, 0, 1)) == {C: 3}, "the newest is there"
    assert index.depths(chain(0)) == {}
    for i in range(400):
        assert index.on_events(A, CacheChange(i, chain(i, 5), ()))
        assert index._num_blocks <= 500
    assert (index.num_blocks(A), index.num_blocks(B), index.num_blocks(C)) == (500, 0, 0)
    assert index.depths(chain(3, 5)) == {A: 2} and index.depths(chain(399, 5)) == {}
    index.remove(A)
    index.add(A, 100, is_exact=True)
    for i in range(300):
        index.on_events(A, CacheChange(i, chain(-i, 5), ()))
    assert index.num_blocks(A) == 100, "not more than its pool has"
    assert len(index._holders) == index._num_blocks <= 500


@pytest.mark.parametrize("names", [[], chain(1)])
def test_of_nobody_there_is_nothing(names: list[int]) -> None:
    assert make().depths(names) == {}
    assert make(10, A).depths(names) == {}
