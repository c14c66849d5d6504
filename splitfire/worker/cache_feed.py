"""What routers are told of the prefix cache: a snapshot, then what came and went, in pages of at most 64 KiB. io thread.

The pool has one list of changes; it is spread over the feeds whenever one of them is asked. A feed that has too much waiting, or whose
router lost count, begins again with a snapshot: so a router that does not read costs a bounded list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from splitfire.core.hashing import BlockHash, short_names
from splitfire.v1 import fleet_pb2

MAX_EVENT_NAMES = 8000  # of 8 bytes, in a message
MAX_PENDING = 50_000  # names; telling all of them anew is not much more
SNAPSHOT_EVERY_S = 1.0  # however often a router asks


class CacheSource(Protocol):
    """The engine."""

    def take_cache_changes(self) -> Mapping[BlockHash, bool] | None: ...

    def cached_names(self) -> Sequence[BlockHash]: ...


class CacheFeed:
    """What one router's stream still has to say. Messages are numbered from 0; the first are a snapshot."""

    def __init__(self, feeds: CacheFeeds) -> None:
        self._feeds = feeds
        self._sequence = 0
        self._pending: dict[BlockHash, bool] = {}  # the last word on each name
        self._must_begin = True
        self._began_at = -SNAPSHOT_EVERY_S

    def resync(self) -> None:
        """The router lost count. Pages under way are finished first, or it could not tell two snapshots apart."""
        self._must_begin = True
        self._pending.clear()

    def note(self, changes: Mapping[BlockHash, bool] | None) -> None:
        """None: there were too many to keep."""
        if self._must_begin:
            return
        if changes is None or len(self._pending) + len(changes) > MAX_PENDING:
            self.resync()
        else:
            self._pending |= changes

    def messages(self, now: float) -> Iterator[fleet_pb2.CacheEvents]:
        """Everything there is to say. What comes up while these are sent is said the next time."""
        self._feeds.collect()
        if self._must_begin:
            if now - self._began_at < SNAPSHOT_EVERY_S:
                return
            self._must_begin, self._began_at = False, now
            names = short_names(self._feeds.source.cached_names())
            for at in (cuts := range(0, max(len(names), 1), MAX_EVENT_NAMES)):
                page = names[at : at + MAX_EVENT_NAMES]
                yield self._numbered(fleet_pb2.CacheEvents(stored=page, is_snapshot=True, is_last_page=at == cuts[-1]))
        elif self._pending:
            pending, self._pending = self._pending, {}
            changes = [*zip(short_names([*pending]), pending.values(), strict=True)]
            for at in range(0, len(changes), MAX_EVENT_NAMES):
                some = changes[at : at + MAX_EVENT_NAMES]
                stored, removed = [name for name, is_here in some if is_here], [name for name, is_here in some if not is_here]
                yield self._numbered(fleet_pb2.CacheEvents(stored=stored, removed=removed))

    def _numbered(self, events: fleet_pb2.CacheEvents) -> fleet_pb2.CacheEvents:
        events.sequence = self._sequence
        self._sequence += 1
        return events


class CacheFeeds:
    """One for each router that is attached."""

    def __init__(self, source: CacheSource) -> None:
        self.source = source
        self._open: list[CacheFeed] = []

    def open(self) -> CacheFeed:
        feed = CacheFeed(self)
        self._open.append(feed)
        return feed

    def close(self, feed: CacheFeed) -> None:
        self._open.remove(feed)

    def collect(self) -> None:
        """Spreads what changed since the last time."""
        changes = self.source.take_cache_changes()
        if changes is None or changes:
            for feed in self._open:
                feed.note(changes)
