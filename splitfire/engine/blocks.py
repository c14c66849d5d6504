"""Which KV block belongs to whom: allocation, prefix cache, eviction. Pure; the bytes are in `pool.py`.

Every block is in exactly one state and the counts always add up to the total:

    FREE       nobody's, content meaningless
    RESERVED   lent to intake for a hand-off; no sequence can see it
    FILLING    a running sequence's, not full or not computed yet
    COMMITTED  full, computed, verified; in the prefix index; used by one sequence or more (a prefix found, or a fork)
    CACHED     as COMMITTED but used by none; evictable, oldest leaf first

Not thread-safe: the engine's lock guards it (`engine.py`). Eviction is leaf first for free: a block's reference count
reaches zero no later than its parent's, and a sequence releases its last block first, so in order of release every child
stands before its parent. What is in the prefix cache belongs to the root of its chain, which is a tenant's own: the root that has
most there, in use or not, gives way first, so a flood takes nothing from those who have less than an equal share.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NewType

from splitfire.core.hashing import BlockHash

BlockId = NewType("BlockId", int)
MAX_CHANGES = 10_000  # names; they wait for a second at most, and one prompt may bring and drive out thousands


class BlockState(Enum):
    """The states above."""

    FREE = "free"
    RESERVED = "reserved"
    FILLING = "filling"
    COMMITTED = "committed"
    CACHED = "cached"


@dataclass(slots=True)
class Block:
    """One block's bookkeeping."""

    state: BlockState = BlockState.FREE
    num_users: int = 0
    name: BlockHash | None = None
    root: BlockHash | None = None  # of the chain, with a name


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Bytes to be copied before anything else is computed (`KvPool.copy`)."""

    source: BlockId
    target: BlockId


class BlockPool:
    """Hands out blocks and remembers what full ones hold. Invariant: `check()`."""

    def __init__(self, num_blocks: int, *, caches_prefixes: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caches_prefixes = caches_prefixes
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: deque[BlockId] = deque(BlockId(i) for i in range(num_blocks))
        self._cached: dict[BlockHash, OrderedDict[BlockId, None]] = {}  # by root, in order of release: oldest leaf first
        self._num_cached = 0
        self._index: dict[BlockHash, BlockId] = {}
        self._num_indexed: Counter[BlockHash] = Counter()  # by root
        self._changes: dict[BlockHash, bool] = {}  # of `_index`: whether the name is there now
        self._has_lost_changes = False

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free, or cached and evictable."""
        return len(self._free) + self._num_cached

    @property
    def num_indexed(self) -> int:
        """Blocks of the prefix cache, in use or not."""
        return len(self._index)

    @property
    def has_changes(self) -> bool:
        """Whether `take_changes` has anything to tell. May be asked without the lock."""
        return bool(self._changes) or self._has_lost_changes

    def take_changes(self) -> dict[BlockHash, bool] | None:
        """The last word on each name that came into the prefix cache (true) or left it since the call before; None when those were
        more than MAX_CHANGES: `names` has to be told anew."""
        changes, self._changes = self._changes, {}
        has_lost, self._has_lost_changes = self._has_lost_changes, False
        return None if has_lost else changes

    def names(self) -> tuple[BlockHash, ...]:
        """The whole prefix cache, in the order in which it came."""
        return tuple(self._index)

    def counts(self) -> dict[BlockState, int]:
        counts = dict.fromkeys(BlockState, 0)
        for block in self._blocks:
            counts[block.state] += 1
        return counts

    def state(self, block_id: BlockId) -> BlockState:
        return self._blocks[block_id].state

    def match(self, names: Sequence[BlockHash]) -> list[BlockId]:
        """The longest leading run of `names` that is here, pinned for the caller; `release` gives it back."""
        found: list[BlockId] = []
        for name in names:
            block_id = self._index.get(name)
            if block_id is None:
                break
            found.append(block_id)
        for block_id in found:
            block = self._blocks[block_id]
            if block.num_users == 0:
                self._uncache(block_id, block)
                block.state = BlockState.COMMITTED
            block.num_users += 1
        return found

    def allocate(self, count: int, state: BlockState = BlockState.FILLING) -> list[BlockId] | None:
        """`count` blocks in FILLING or RESERVED, evicting cached ones as needed; None, and no change, when there are not enough."""
        if count > self.num_available:
            return None
        return [self._take(state) for _ in range(count)]

    def commit(self, block_id: BlockId, name: BlockHash, root: BlockHash) -> None:
        """The block is full and its content is right: it may be shared from now on, with those whose chains have the same root.

        Where another block already has this name the first one stays in the index; this one is freed on release.
        """
        block = self._blocks[block_id]
        assert block.state in (BlockState.FILLING, BlockState.RESERVED) and block.num_users == 1, block
        block.state = BlockState.COMMITTED
        if self._caches_prefixes and name not in self._index:
            block.name, block.root = name, root
            self._index[name] = block_id
            self._num_indexed[root] += 1
            self._note(name, is_here=True)

    def forget(self, block_ids: Sequence[BlockId]) -> None:
        """Takes blocks of a user out of the index: what they hold cannot be trusted. They are free once nobody uses them, and
        what others computed from them is not found any more."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.num_users > 0, block
            if block.name is not None:
                self._unindex(block)

    def share(self, block_ids: Sequence[BlockId]) -> None:
        """One user more for each: full blocks of a sequence, for one that is forked from it."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.state is BlockState.COMMITTED, block
            block.num_users += 1

    def begin_filling(self, block_id: BlockId) -> None:
        """An intake's block that is not full goes on as a running sequence's."""
        block = self._blocks[block_id]
        assert block.state is BlockState.RESERVED, block
        block.state = BlockState.FILLING

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """One user less for each. Give a sequence's blocks in their order; the last is released first."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.num_users > 0, f"block {block_id} released twice"
            block.num_users -= 1
            if block.num_users:
                continue
            if block.root is not None:
                block.state = BlockState.CACHED
                if block.root not in self._cached:
                    self._cached[block.root] = OrderedDict()
                self._cached[block.root][block_id] = None
                self._num_cached += 1
            else:
                block.state = BlockState.FREE
                self._free.append(block_id)

    def check(self) -> None:
        """Conservation (P4): raises AssertionError when a block is lost or in two places."""
        counts = self.counts()
        assert sum(counts.values()) == self.num_blocks
        assert counts[BlockState.FREE] == len(self._free) == len(set(self._free))
        assert counts[BlockState.CACHED] == self._num_cached == sum(map(len, self._cached.values()))
        assert all(self._cached.values())
        assert self._num_indexed == Counter(block.root for block in self._blocks if block.root is not None)
        for name, block_id in self._index.items():
            assert self._blocks[block_id].name == name
        for block in self._blocks:
            is_used = block.state not in (BlockState.FREE, BlockState.CACHED)
            assert is_used == (block.num_users > 0), block

    def _take(self, state: BlockState) -> BlockId:
        if self._free:
            block_id = self._free.popleft()
        else:
            [root] = self._cached if len(self._cached) == 1 else [max(self._cached, key=self._num_indexed.__getitem__)]
            block_id = next(iter(self._cached[root]))
            self._uncache(block_id, self._blocks[block_id])
            self._unindex(self._blocks[block_id])
        block = self._blocks[block_id]
        block.state, block.num_users = state, 1
        return block_id

    def _uncache(self, block_id: BlockId, block: Block) -> None:
        assert block.root is not None
        blocks = self._cached[block.root]
        del blocks[block_id]
        if not blocks:
            del self._cached[block.root]
        self._num_cached -= 1

    def _unindex(self, block: Block) -> None:
        assert block.name is not None and block.root is not None
        del self._index[block.name]
        self._num_indexed[block.root] -= 1
        if not self._num_indexed[block.root]:
            del self._num_indexed[block.root]
        self._note(block.name, is_here=False)
        block.name = block.root = None

    def _note(self, name: BlockHash, *, is_here: bool) -> None:
        if self._has_lost_changes:
            return
        self._changes[name] = is_here
        if len(self._changes) > MAX_CHANGES:
            self._changes, self._has_lost_changes = {}, True
