"""The simulated pool beside a real one: nothing is lost, and the same is found and evicted."""

from __future__ import annotations

from random import Random

import pytest

from router.simulation.pool import CachePool, Lease
from splitfire.core.hashing import BlockHash
from splitfire.engine.blocks import BlockId, BlockPool

ROOT = BlockHash(bytes(32))


def name_of(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "little"))


@pytest.mark.parametrize("seed", range(5))
def test_the_simulated_pool_finds_and_evicts_what_the_engines_does(seed: int) -> None:
    random = Random(seed)
    pool, real = CachePool(40), BlockPool(40)
    chains = [list(range(100 * i, 100 * i + random.randint(1, 12))) for i in range(12)]
    held: list[tuple[Lease, list[BlockId]]] = []
    for _ in range(400):
        if held and random.random() < 0.45:
            lease, blocks = held.pop(random.randrange(len(held)))
            pool.release(lease)
            real.release(blocks)
        else:
            chain = random.choice(chains)
            chain = chain[: random.randint(1, len(chain))]
            num_blocks = len(chain) + random.randint(0, 3)
            lease_or_none = pool.admit(chain, num_blocks)
            found = real.match([name_of(number) for number in chain])
            rest = real.allocate(num_blocks - len(found))
            if lease_or_none is None or rest is None:
                assert lease_or_none is None and rest is None
                real.release(found)
            else:
                assert len(lease_or_none.names) == len(found)
                pool.commit(lease_or_none, chain[len(found) :])
                for block, number in zip(rest, chain[len(found) :], strict=False):
                    real.commit(block, name_of(number), ROOT)
                held.append((lease_or_none, [*found, *rest]))
        pool.check()
        assert pool.num_available == real.num_available


def test_named_blocks_beyond_the_bound_go_the_oldest_leaf_first() -> None:
    pool = CachePool(100, max_cached=3)
    lease = pool.admit([1, 2, 3, 4], 5)
    assert lease is not None
    pool.commit(lease, [1, 2, 3, 4])
    assert pool.num_named == 4, "in use: they cannot go"
    pool.release(lease)
    assert pool.depth([1, 2, 3, 4]) == 3
    pool.check()


def test_what_a_pool_tells_is_what_it_has() -> None:
    pool, told = CachePool(6), set[int]()
    random = Random(1)
    for _ in range(100):
        chain = [10 * random.randrange(4) + i for i in range(3)]
        lease = pool.admit(chain, 4)
        assert lease is not None
        pool.commit(lease, chain[len(lease.names) :])
        pool.release(lease)
        if random.random() < 0.3:
            stored, removed = pool.take_changes()
            told = (told | set(stored)) - set(removed)
            assert told == {name for first in range(0, 40, 10) for name in range(first, first + 3) if pool.depth([name])}
