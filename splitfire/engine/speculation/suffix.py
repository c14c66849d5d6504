"""Where the end of a text occurred before: n-grams in hash chains, as in LZ77, so nothing is ever scanned again. Pure.

Every position is filed under a hash of the MIN_MATCH tokens before it, linked to the position filed there last; a search
walks at most MAX_CANDIDATES of these links, latest first, and compares tokens. What it misses are occurrences behind
MAX_CANDIDATES later ones of the same hash.

Memory: a pointer and 4 bytes a token, and 4 bytes a bucket, of which there are at most four a token: under 32 bytes a token
from 1024 tokens on. Owned by one thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_MATCH = 3
MAX_MATCH = 64  # longer matches are not told apart
MAX_CANDIDATES = 16
FIRST_BUCKETS = 1 << 10
BULK = 64  # from this many tokens on, arrays are faster than a loop

# A rolling hash of 30 bits: each token moves the older ones up by 10, so that the third is the last to leave a trace.
_MULTIPLIER = 0x2C1B3C6D  # odd; spreads small token ids over all bits
_SHIFT = 10
_BITS = MIN_MATCH * _SHIFT
_MASK = (1 << _BITS) - 1


@dataclass(frozen=True, slots=True)
class Match:
    """The text before position `at` equals the ending searched for, in its last `length` tokens."""

    at: int
    length: int


def rolled(state: int, token_id: int) -> int:
    """The hash of the last MIN_MATCH tokens once `token_id` follows."""
    return ((state << _SHIFT) ^ (token_id * _MULTIPLIER)) & _MASK


class SuffixIndex:
    """A text that grows at its end. A position is filed when the token at it is known, so a match always has a next token."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self.token_ids: list[int] = []
        self.state = 0  # of the rolling hash
        self._links = array("i")  # [len(token_ids)] the position filed before under the same hash; 0: none
        self._buckets = array("i", bytes(4 * FIRST_BUCKETS))
        self._down = _BITS - (FIRST_BUCKETS.bit_length() - 1)
        self.extend(token_ids)

    def append(self, token_id: int) -> bool:
        """Whether `find` may have something to say about the new end: False is certain."""
        tokens, state = self.token_ids, self.state
        at = len(tokens)
        bucket = state >> self._down
        if at >= MIN_MATCH:
            self._links.append(self._buckets[bucket])
            self._buckets[bucket] = at
        else:
            self._links.append(0)
        tokens.append(token_id)
        self.state = state = ((state << _SHIFT) ^ (token_id * _MULTIPLIER)) & _MASK
        if at > len(self._buckets):
            self._file_all()
        found = self._buckets[state >> self._down]
        return found != 0 and (tokens[found - 1] == token_id or self._links[found] != 0)

    def extend(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) < BULK:
            for token_id in token_ids:
                self.append(token_id)
            return
        first = len(self.token_ids)
        self.token_ids.extend(token_ids)
        self._links.frombytes(bytes(4 * len(token_ids)))
        for token_id in token_ids[-MIN_MATCH:]:
            self.state = rolled(self.state, token_id)
        if len(self.token_ids) > len(self._buckets):
            self._file_all()
        else:
            self._file(first)

    def find(self, ending: Sequence[int], state: int) -> Match | None:
        """The longest match for the end of `ending`, whose rolling hash is `state`; the latest of equally long ones.
        `ending` may be this text itself: its own end is not filed yet."""
        at = self._buckets[state >> self._down]
        limit = min(len(ending), MAX_MATCH)
        if not at or limit < MIN_MATCH:
            return None
        tokens, links = self.token_ids, self._links
        last, second, third = ending[-1], ending[-2], ending[-3]
        best_at = best = 0
        for _ in range(MAX_CANDIDATES):
            # One that is to be longer than the best also has the token before the best's first.
            if tokens[at - 1] == last and tokens[at - 2] == second and tokens[at - 3] == third:
                length = MIN_MATCH
                if not best or (at > best and tokens[at - 1 - best] == ending[-1 - best]):
                    most = min(limit, at)
                    while length < most and tokens[at - 1 - length] == ending[-1 - length]:
                        length += 1
                if length > best:
                    best_at, best = at, length
                    if length == limit:
                        break
            at = links[at]
            if not at:
                break
        return Match(best_at, best) if best else None

    def _file_all(self) -> None:
        """Files the whole text anew, with room to double."""
        bits = min((2 * len(self.token_ids) - 1).bit_length(), _BITS)
        self._buckets = array("i", bytes(4 << bits))
        self._down = _BITS - bits
        self._file(0)

    def _file(self, first: int) -> None:
        """Files positions [first, end) at once: what `append` does, in arrays."""
        first, end = max(first, MIN_MATCH), len(self.token_ids)
        if first >= end:
            return
        spread = np.array(self.token_ids[first - MIN_MATCH : end - 1], dtype=np.int64) * _MULTIPLIER & _MASK
        states = (spread[2:] ^ (spread[1:-1] << _SHIFT) ^ (spread[:-2] << 2 * _SHIFT)) & _MASK
        filed = states >> self._down
        order = np.argsort(filed, kind="stable")
        filed, positions = filed[order], (order + first).astype(np.int32)
        begins = np.ones(len(filed), dtype=bool)  # a run of one bucket
        begins[1:] = filed[1:] != filed[:-1]
        ends = np.roll(begins, -1)
        buckets, links = np.frombuffer(self._buckets, dtype=np.int32), np.frombuffer(self._links, dtype=np.int32)
        before = np.roll(positions, 1)
        before[begins] = buckets[filed[begins]]
        links[positions] = before
        buckets[filed[ends]] = positions[ends]
