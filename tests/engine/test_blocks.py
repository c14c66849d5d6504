"""The block pool: conservation in any order of operations, leaf-first eviction, names shared only when full."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitfire.core.hashing import BlockHash, chain_root, hash_blocks
from splitfire.engine.blocks import BlockId, BlockPool, BlockState

ROOT = chain_root(b"", b"model", "")


def names(*tokens: int, root: BlockHash = ROOT) -> list[BlockHash]:
    """Chained names of blocks of one token each."""
    return list(hash_blocks(root, tokens, 1))


def fill(pool: BlockPool, chain: list[BlockHash], root: BlockHash = ROOT) -> list[BlockId]:
    """A sequence that computes the blocks of `chain`, sharing what is cached."""
    found = pool.match(chain)
    rest = pool.allocate(len(chain) - len(found))
    assert rest is not None
    for block_id, name in zip(rest, chain[len(found) :], strict=True):
        pool.commit(block_id, name, root)
    return [*found, *rest]


def num_cached(pool: BlockPool, chain: list[BlockHash]) -> int:
    found = pool.match(chain)
    pool.release(found)
    return len(found)


def test_a_released_prefix_is_found_again() -> None:
    pool = BlockPool(8)
    first = fill(pool, names(1, 2, 3))
    pool.release(first)
    assert pool.counts()[BlockState.CACHED] == 3
    assert pool.match(names(1, 2, 9)) == first[:2]
    assert pool.counts()[BlockState.COMMITTED] == 2
    pool.check()


def test_nothing_is_shared_before_it_is_full() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert blocks is not None
    assert pool.match(names(1, 2)) == []
    pool.commit(blocks[0], names(1)[0], ROOT)
    assert pool.match(names(1, 2)) == [blocks[0]]


def test_leaves_are_evicted_before_their_parents() -> None:
    pool = BlockPool(6)
    trunk, left, right = names(1, 2), names(1, 2, 3, 4), names(1, 2, 5, 6)
    a, b = fill(pool, left), fill(pool, right)
    pool.release(a)
    pool.release(b)
    for expected_left in (5, 4, 3, 2):
        taken = pool.allocate(1)
        assert taken is not None
        assert num_cached(pool, left) + num_cached(pool, right) - 2 >= expected_left - 2
        assert num_cached(pool, trunk) == 2, "the trunk went before its leaves"


def test_the_same_content_computed_twice_is_indexed_once() -> None:
    pool = BlockPool(4)
    one, two = pool.allocate(1), pool.allocate(1)
    assert one is not None
    assert two is not None
    [name] = names(1)
    pool.commit(one[0], name, ROOT)
    pool.commit(two[0], name, ROOT)
    assert pool.match([name]) == one
    pool.release(two)
    assert pool.state(two[0]) is BlockState.FREE
    pool.check()


def test_too_many_blocks_change_nothing() -> None:
    pool = BlockPool(4)
    held = pool.allocate(3)
    assert held is not None
    assert pool.allocate(2) is None
    assert pool.num_available == 1
    pool.check()


def test_releasing_twice_is_a_bug_that_shows() -> None:
    pool = BlockPool(2)
    held = pool.allocate(1)
    assert held is not None
    pool.release(held)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(held)


def test_without_prefix_caching_everything_is_free_again() -> None:
    pool = BlockPool(4, caches_prefixes=False)
    pool.release(fill(pool, names(1, 2)))
    assert pool.counts()[BlockState.FREE] == 4
    assert pool.match(names(1, 2)) == []


def test_what_cannot_be_trusted_is_found_by_nobody_and_free_after_its_last_user() -> None:
    pool = BlockPool(6)
    one = fill(pool, names(1, 2, 3))
    two = fill(pool, names(1, 2, 4))
    pool.forget(one)
    assert pool.match(names(1, 2, 3)) == []
    again = fill(pool, names(1, 2))
    assert not set(again) & {*one, *two}
    pool.release(one)
    assert pool.counts()[BlockState.FREE] == 1, "the other two are still used"
    pool.release(two)
    assert pool.counts()[BlockState.FREE] == 3 and pool.counts()[BlockState.CACHED] == 1
    pool.check()


def test_cache_quota_per_tenant() -> None:
    """F58: a flood drives out what is its own, oldest leaves first, and of others only what they have above an equal share."""
    pool = BlockPool(26)
    tenants = [chain_root(bytes([i]), b"model", "") for i in range(4)]
    quiet = [names(*range(count), root=root) for root, count in zip(tenants, (3, 12), strict=False)]
    for root, chain in zip(tenants, quiet, strict=False):
        pool.release(fill(pool, chain, root))
    flood = [names(*range(100 * i, 100 * i + 4), root=tenants[2]) for i in range(50)]
    for chain in flood:
        pool.release(fill(pool, chain, tenants[2]))
        pool.check()
    # While the flood fills four blocks, 22 are left: 3 for who has no more, and half of the rest for each of the others.
    assert [num_cached(pool, chain) for chain in quiet] == [3, 9]
    assert [num_cached(pool, chain) for chain in flood[-5:]] == [0, 2, 4, 4, 4]
    late = names(*range(3), root=tenants[3])
    for token in range(3):
        pool.release(fill(pool, late[: token + 1], tenants[3]))
    assert [num_cached(pool, chain) for chain in (*quiet, late)] == [3, 9, 3]
    assert sum(num_cached(pool, chain) for chain in flood) == 11


def test_who_has_little_may_use_what_nobody_else_needs() -> None:
    pool, root = BlockPool(8), chain_root(b"only", b"model", "")
    pool.release(fill(pool, names(*range(8), root=root), root))
    assert num_cached(pool, names(*range(8), root=root)) == 8


def test_a_name_that_went_and_came_back_is_there() -> None:
    """The router is told the last word, whatever the order within a batch."""
    pool = BlockPool(2)
    pool.release(fill(pool, names(1, 2)))
    assert pool.take_changes() == dict.fromkeys(names(1, 2), True)
    assert pool.take_changes() == {}
    pool.release(fill(pool, names(3, 4)))
    pool.release(fill(pool, names(1)))
    assert pool.take_changes() == {names(1)[0]: True, names(1, 2)[1]: False, names(3)[0]: True, names(3, 4)[1]: False}
    assert pool.names() == (names(3)[0], names(1)[0])
    held = fill(pool, names(1))
    pool.forget(held)
    assert pool.take_changes() == {names(1)[0]: False}


def test_changes_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfire.engine.blocks.MAX_CHANGES", 4)
    pool = BlockPool(4)
    pool.release(fill(pool, names(1, 2, 3, 4)))
    pool.release(fill(pool, names(5)))
    assert pool.has_changes
    assert pool.take_changes() is None
    assert pool.take_changes() == {}
    assert set(pool.names()) == {*names(1, 2, 3), *names(5)}


class PoolMachine(RuleBasedStateMachine):
    """Sequences of two tenants come, grow, commit, hand over and go in any order; the pool's books always balance (P4), and who is
    told every change knows what is cached."""

    @initialize(size=st.integers(4, 24))
    def start(self, size: int) -> None:
        self.pool = BlockPool(size)
        self.held: list[tuple[list[BlockId], list[BlockHash]]] = []
        self.random = random.Random(size)
        self.told: set[BlockHash] = set()

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6), reserved=st.booleans(), salt=st.sampled_from((b"", b"s")))
    def begin(self, tokens: list[int], reserved: bool, salt: bytes) -> None:
        root = chain_root(salt, b"model", "")
        chain = names(*tokens, root=root)
        found = self.pool.match(chain)
        rest = self.pool.allocate(len(chain) - len(found), BlockState.RESERVED if reserved else BlockState.FILLING)
        if rest is None:
            self.pool.release(found)
            return
        for block_id, name in zip(rest, chain[len(found) :], strict=True):
            if self.random.random() < 0.8:
                self.pool.commit(block_id, name, root)
        self.held.append(([*found, *rest], chain))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        blocks, _ = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        more = self.pool.allocate(1)
        if more is not None:
            blocks.extend(more)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks, chain = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        self.pool.forget(blocks)
        found = self.pool.match(chain)
        assert not set(found) & set(blocks)
        self.pool.release(found)

    @precondition(lambda self: hasattr(self, "pool"))
    @rule()
    def tell(self) -> None:
        changes = self.pool.take_changes()
        assert changes is not None
        self.told |= {name for name, is_here in changes.items() if is_here}
        self.told -= {name for name, is_here in changes.items() if not is_here}
        assert self.told == set(self.pool.names())

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            used = {b for blocks, _ in self.held for b in blocks}
            assert self.pool.num_blocks - self.pool.num_available == len(used)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks, _ in self.held:
                self.pool.release(blocks)
            assert self.pool.num_available == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_books_balance = PoolMachine.TestCase
