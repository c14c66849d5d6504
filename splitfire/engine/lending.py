"""Blocks on loan to the io thread: those of sequences whose KV arrives from elsewhere. Any thread; takes the engine's lock.

What is lent is RESERVED, so no sequence can see it. A reservation ends by `forfeit`, or by the engine's `join`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from splitfire.core.hashing import BlockHash
from splitfire.engine.blocks import BlockId, BlockState
from splitfire.engine.scheduler import Scheduler
from splitfire.engine.sequence import SequenceSpec


@dataclass(slots=True)
class Reservation:
    """Blocks lent to intake: the leading `num_pinned` are shared from the prefix cache, the rest RESERVED.

    Owned by the io thread from `reserve` until `join` or `forfeit`.
    """

    spec: SequenceSpec
    block_ids: list[BlockId]
    num_pinned: int
    num_lanes: int  # one for each choice


class Lending:
    """Lends while enough is left: a block for each sequence that grows, and what the first that waits here needs."""

    def __init__(self, scheduler: Scheduler, lock: threading.Lock, block_size: int) -> None:
        self._scheduler = scheduler
        self._blocks = scheduler.pool
        self._lock = lock
        self._block_size = block_size

    @property
    def is_short(self) -> bool:
        """Sequences that run may soon find no block, while some are lent."""
        with self._lock:
            num_running = len(self._scheduler.running)
            return self._scheduler.num_reserved > 0 and num_running > 0 and self._blocks.num_available < (num_running + 1) // 2

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        """Blocks for a sequence whose KV will arrive; None when there are not enough, or too many sequences, right now."""
        size = self._block_size
        wanted = -(-spec.num_tokens // size)
        with self._lock:
            num_lanes = min(len(spec.choices), self._scheduler.budget.max_running)
            first = self._scheduler.first_before(spec)
            num_kept = -(-first.num_tokens // size) if first is not None else 0
            if self._scheduler.num_free_lanes < num_lanes + (first is not None):
                return None
            pinned = self._blocks.match(spec.block_hashes[: (spec.num_tokens - 1) // size])
            if not self._scheduler.has_room(spec, spec.num_tokens, len(pinned), num_kept):
                self._blocks.release(pinned)
                return None
            rest = self._blocks.allocate(wanted - len(pinned), BlockState.RESERVED)
            assert rest is not None
            self._scheduler.num_reserved += num_lanes
            self._scheduler.num_reserved_blocks += wanted
        return Reservation(spec, [*pinned, *rest], len(pinned), num_lanes)

    def commit(self, reservation: Reservation, first_block: int, num_blocks: int, names: Seq[BlockHash]) -> None:
        """Blocks [first_block, first_block + num_blocks) of a reservation were verified and written; full ones get shareable."""
        full = reservation.spec.num_tokens // self._block_size
        with self._lock:
            for block in range(first_block, min(first_block + num_blocks, full)):
                self._blocks.commit(reservation.block_ids[block], names[block], reservation.spec.hash_root)

    def forfeit(self, reservation: Reservation) -> None:
        """Gives a reservation's blocks back; nothing joins."""
        with self._lock:
            self._scheduler.num_reserved -= reservation.num_lanes
            self._scheduler.num_reserved_blocks -= len(reservation.block_ids)
            self._blocks.release(reservation.block_ids)
        reservation.block_ids = []
