"""Running sequences as columns: a lane for each, in arrays that a step reads and writes whole. Pure but for numpy.

What a decode step needs of 256 sequences is a handful of numpy calls here, and one by one would cost ten times as much. Used
under the engine's lock while it schedules and updates, and by the engine thread in between.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from splitfire.engine.sequence import Sequence

Ints = NDArray[np.int64]
NEVER = 1 << 62
NOBODY = -1  # no token has this id
Append: TypeAlias = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decoding:
    """Sequences that lack their newest token's KV only, in order of lane: one row each."""

    lanes: Ints
    appends: Seq[Append]  # of their token lists

    def __len__(self) -> int:
        return len(self.appends)

    def where(self, keeps: NDArray[np.bool_]) -> Decoding:
        """Those for which `keeps` is true."""
        return Decoding(self.lanes[keeps], list(compress(self.appends, keeps.tolist())))


class Lanes:
    """The running sequences. Invariant: a lane's columns say what its sequence says (`tokens`, `block_ids`, ...)."""

    def __init__(self, num_lanes: int, block_size: int) -> None:
        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * num_lanes
        self.newest = np.zeros(num_lanes, np.int64)  # token id
        self.num_tokens = np.zeros(num_lanes, np.int64)
        self.num_prompt = np.zeros(num_lanes, np.int64)
        self.seq_ids = np.zeros(num_lanes, np.int64)
        self.room = np.zeros(num_lanes, np.int64)  # tokens that its blocks have room for
        self.ends_at = np.zeros(num_lanes, np.int64)  # tokens, the last without KV; 0 when nobody has the lane
        self.commits_at = np.zeros(num_lanes, np.int64)  # computed tokens by which another block is full
        self.greedy_from = np.zeros(num_lanes, np.int64)  # tokens from which the next one is the plain argmax
        self.plain_from = np.zeros(num_lanes, np.int64)  # tokens from which it takes no more than logits and sampling parameters
        self.needs_host = np.zeros(num_lanes, np.bool_)  # a token of it is not done with when it is drawn
        self.num_flights = 0  # steps that were launched and are not over
        self.num_in_flight = np.zeros(num_lanes, np.int64)  # of these, those that the lane is in
        self.stop_ids = np.full((num_lanes, 2), NOBODY)
        self.block_tables = np.zeros((num_lanes, 16), np.int32)  # what is past a sequence's blocks is anything
        self.new_from = np.full(num_lanes, NEVER)  # logical block from which a copy of the tables (device/) is out of date
        self._appends: list[Append] = [_nobody] * num_lanes
        self._free = list(range(num_lanes))[::-1]
        self._is_decoding = np.zeros(num_lanes, np.bool_)
        self._is_leaving = np.zeros(num_lanes, np.bool_)
        self._decoding: Decoding | None = None  # until who decodes changes

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_growing(self) -> int:
        """Sequences that will need blocks they do not have yet."""
        return int(np.count_nonzero(self.ends_at - 1 > self.room))

    @property
    def decoding(self) -> Decoding:
        if self._decoding is None:
            lanes = self._is_decoding.nonzero()[0]
            self._decoding = Decoding(lanes, _pick(self._appends, lanes))
        return self._decoding

    @property
    def nothing(self) -> Decoding:
        return Decoding(np.zeros(0, np.int64), [])

    @property
    def runnable(self) -> Decoding:
        """Those of `decoding` that go on even if no token in flight ends them."""
        decoding = self.decoding
        if not self.num_flights:
            return decoding
        pending = self.num_in_flight[decoding.lanes]
        return decoding.where(self.num_tokens[decoding.lanes] + pending < self.ends_at[decoding.lanes])

    def at(self, lanes: Ints) -> list[Sequence]:
        """Only taken lanes may be asked for."""
        return _pick(self.sequences, lanes)  # type: ignore[arg-type]

    def take(self, sequence: Sequence) -> None:
        """A lane for a sequence that begins to run, with the tokens and blocks it has now."""
        lane = sequence.lane = self._free.pop()
        spec = sequence.spec
        self.sequences[lane] = sequence
        self._appends[lane] = sequence.tokens.append
        self.num_prompt[lane] = len(spec.prompt)
        self.seq_ids[lane] = spec.seq_id
        self.ends_at[lane] = spec.ends_at
        self.greedy_from[lane] = sequence.greedy_from if sequence.greedy_from is not None else NEVER
        self.plain_from[lane] = sequence.plain_from if sequence.plain_from is not None else NEVER
        self.needs_host[lane] = sequence.needs_host
        stop_ids = sorted(spec.stopping.stop_token_ids)
        self.stop_ids = _widened(self.stop_ids, len(stop_ids), NOBODY)
        self.stop_ids[lane] = NOBODY
        self.stop_ids[lane, : len(stop_ids)] = stop_ids
        self.room[lane] = 0
        self.put_blocks(sequence, 0)
        self.update(sequence)

    def leave(self, sequence: Sequence) -> None:
        lane = sequence.lane
        self.sequences[lane] = None
        self._appends[lane] = _nobody
        self._free.append(lane)
        self.ends_at[lane] = 0
        self._is_decoding[lane] = self._is_leaving[lane] = False
        self._decoding = None
        sequence.lane = -1
        sequence.is_decoding = False

    def retire(self, sequence: Sequence) -> None:
        """It has ended, but a step in flight writes into its blocks: until that is over it keeps the lane and does nothing."""
        self._is_leaving[sequence.lane] = True
        self._is_decoding[sequence.lane] = False
        self._decoding = None

    def is_leaving(self, lanes: Ints) -> NDArray[np.bool_]:
        return self._is_leaving[lanes]

    def decode(self, sequence: Sequence) -> None:
        """From now on it is one of `decoding`."""
        sequence.is_decoding = True
        self.new_from[sequence.lane] = 0
        self.seq_ids[sequence.lane] = sequence.spec.seq_id  # of several choices, it may have become one meanwhile
        self.update(sequence)
        self._is_decoding[sequence.lane] = True
        self._decoding = None

    def update(self, sequence: Sequence) -> None:
        """Its tokens, or the blocks that are committed, are others than before."""
        lane, tokens = sequence.lane, sequence.tokens
        self.newest[lane] = tokens[-1]
        self.num_tokens[lane] = len(tokens)
        self.commits_at[lane] = (sequence.num_committed_blocks + 1) * self.block_size

    def put_blocks(self, sequence: Sequence, first: int) -> None:
        """Its blocks from its logical block `first` on are others than before."""
        lane, ids = sequence.lane, sequence.block_ids
        self.block_tables = _widened(self.block_tables, len(ids), 0)
        self.block_tables[lane, first : len(ids)] = ids[first:]
        self.new_from[lane] = min(self.new_from[lane], first)
        self.room[lane] = len(ids) * self.block_size

    def short(self) -> list[Sequence]:
        """Runnable sequences whose newest token, which may be in flight, has no block."""
        lanes = self.runnable.lanes
        num_tokens = self.num_tokens[lanes] + self.num_in_flight[lanes] if self.num_flights else self.num_tokens[lanes]
        return self.at(lanes[num_tokens > self.room[lanes]])

    def append(self, decoding: Decoding, token_ids: Ints) -> Appended:
        """One more token for each."""
        lanes = decoding.lanes
        before = self.num_tokens[lanes]
        after = before + 1
        self.num_tokens[lanes] = after
        self.newest[lanes] = token_ids
        for append, token in zip(decoding.appends, token_ids.tolist(), strict=True):
            append(token)
        stops = self.stop_ids.take(lanes, 0) == token_ids[:, None]
        has_stopped = (
            stops.any(1) if stops.any() else np.zeros(len(lanes), np.bool_)
        )  # the second is five times faster than the first
        return Appended(
            has_stopped,
            has_stopped | (after >= self.ends_at[lanes]),
            before >= self.commits_at[lanes],
            before - self.num_prompt[lanes],
        )

    def check(self) -> None:
        """The invariant; for tests."""
        taken = [s for s in self.sequences if s is not None]
        assert len(taken) + len(self._free) == len(self.sequences)
        for sequence in taken:
            lane, ids = sequence.lane, sequence.block_ids
            assert self.sequences[lane] is sequence
            assert (self.newest[lane], self.num_tokens[lane]) == (sequence.tokens[-1], len(sequence.tokens))
            assert self.block_tables[lane, : len(ids)].tolist() == ids
            assert self.room[lane] == len(ids) * self.block_size >= sequence.num_computed
            assert self.commits_at[lane] == (sequence.num_committed_blocks + 1) * self.block_size
            assert self._is_decoding[lane] == (sequence.is_decoding and not self._is_leaving[lane])
            assert self.num_in_flight[lane] > 0 or not self._is_leaving[lane]
            assert self.seq_ids[lane] == sequence.spec.seq_id
        assert self.at(self.decoding.lanes) == [s for s in taken if self._is_decoding[s.lane]]


@dataclass(frozen=True, slots=True)
class Appended:
    """What one more token meant for each sequence; all of one length."""

    has_stopped: NDArray[np.bool_]  # by a stop token
    has_ended: NDArray[np.bool_]  # by that or by length
    has_filled: NDArray[np.bool_]  # a block
    offsets: Ints  # of the token among all output tokens


def _pick(items: Seq[T], lanes: Ints) -> list[T]:
    """In C: 256 of them one by one would cost what scheduling them does."""
    return [*itemgetter(*lanes.tolist())(items)] if len(lanes) > 1 else [items[lane] for lane in lanes.tolist()]


def _nobody(_token_id: int) -> None:
    raise AssertionError("a lane that nobody has got a token")


def _widened(table: NDArray[np.generic], width: int, fill: int) -> NDArray:  # type: ignore[type-arg]
    """The table with at least `width` columns; at least doubled when it has fewer, so that this happens a few times only."""
    if table.shape[1] >= width:
        return table
    wider = np.full((table.shape[0], max(width, 2 * table.shape[1])), fill, table.dtype)
    wider[:, : table.shape[1]] = table
    return wider
