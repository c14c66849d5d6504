"""KV blocks of one worker and the prefix cache in them, by 64-bit names. Pure.

As `splitfire/engine/blocks.py` does it: what a sequence uses stays, what nobody uses is kept under its name until the room is needed, the
oldest leaf first. Blocks without a name are only counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Lease:
    """Blocks that one sequence has: named ones, which it may share, and others."""

    names: list[int] = field(default_factory=list)
    num_filling: int = 0


class CachePool:
    """Invariant: free, filling, used and cached blocks add up to `num_blocks`."""

    def __init__(self, num_blocks: int, max_cached: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_filling = 0
        self._max_cached = num_blocks if max_cached is None else max_cached
        self._users: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # in order of release: oldest leaf first
        self._changes: dict[int, bool] = {}  # whether a name is here; since the last `take_changes`

    @property
    def num_available(self) -> int:
        return self.num_free + len(self._cached)

    @property
    def num_named(self) -> int:
        return len(self._users) + len(self._cached)

    def depth(self, names: Sequence[int]) -> int:
        """How many leading ones are here."""
        users, cached = self._users, self._cached
        for depth, name in enumerate(names):
            if name not in users and name not in cached:
                return depth
        return len(names)

    def admit(self, names: Sequence[int], num_blocks: int) -> Lease | None:
        """`num_blocks`, the leading ones as found under `names`; None, and no change, when there are not enough."""
        depth = min(self.depth(names), num_blocks)
        found = names[:depth]
        users, cached = self._users, self._cached
        idle = [name for name in found if name in cached]
        missing = num_blocks - depth
        if missing > self.num_available - len(idle):
            return None
        for name in idle:
            del cached[name]
            users[name] = 0
        for name in found:
            users[name] += 1
        while self.num_free < missing:
            self._evict()
        self.num_free -= missing
        self.num_filling += missing
        return Lease(list(found), missing)

    def commit(self, lease: Lease, names: Sequence[int]) -> None:
        """These are full now and follow what the lease has. Where somebody has computed one too, his stays."""
        for name in names:
            if name in self._users or name in self._cached or not lease.num_filling:
                continue
            self._users[name] = 1
            lease.names.append(name)
            lease.num_filling -= 1
            self.num_filling -= 1
            self._changes[name] = True
        while self.num_named > self._max_cached and self._cached:
            self._evict()

    def release(self, lease: Lease) -> None:
        """The last block first, so that every leaf is older than what it follows."""
        users = self._users
        for name in reversed(lease.names):
            users[name] -= 1
            if not users[name]:
                del users[name]
                self._cached[name] = None
        self.num_filling -= lease.num_filling
        self.num_free += lease.num_filling
        lease.names, lease.num_filling = [], 0
        while self.num_named > self._max_cached and self._cached:
            self._evict()

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Names stored and removed since the last time, as they stand now."""
        changes, self._changes = self._changes, {}
        return [name for name, is_here in changes.items() if is_here], [name for name, is_here in changes.items() if not is_here]

    def check(self) -> None:
        """AssertionError when a block is lost or in two places."""
        assert self.num_free >= 0 and self.num_filling >= 0
        assert self.num_free + self.num_filling + self.num_named == self.num_blocks
        assert not self._users.keys() & self._cached.keys()
        assert all(count > 0 for count in self._users.values())

    def _evict(self) -> None:
        name, _ = self._cached.popitem(last=False)
        self.num_free += 1
        self._changes[name] = False
