"""Which sequences of a step share a prefix that is worth attending once (attend_shared.py). Plain numpy, on the host, made anew when a
sequence joins or leaves: what is shared does not grow while sequences do.

Sequences share a prefix when their block tables begin with the same ids. In the order of their tables those that do are neighbours; a
run of neighbours shares the least that two of them share, and is divided there if its parts save more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitfire.engine.kernels.gpu.spans import UNIT

# The two launches of a layer cost some 5 us, in which an H200 reads 24 MB: of a Llama-3.1-8B in bf16, 6000 tokens of a layer (4 KB each).
# Estimated, not measured. Shorter prefixes are not looked for.
LEAST_SAVED = 6144  # tokens a step reads less
SHORTEST = 256  # tokens


@dataclass(frozen=True, slots=True)
class Prefix:
    """`members` (at least two places in the step's batch) all see these `num_tokens` from each of their rows."""

    members: tuple[int, ...]
    num_tokens: int  # a multiple of UNIT and of a block


@dataclass(frozen=True, slots=True)
class PrefixColumns:
    """Prefixes as `Spans` of groups and `cut` take them, int32; groups past the last have no rows."""

    begins: NDArray[np.int32]  # [capacity]
    ends: NDArray[np.int32]  # [capacity]
    contexts: NDArray[np.int32]  # [capacity]
    lanes: NDArray[np.int32]  # [capacity]: a member's
    members: NDArray[np.int32]  # [num_rows]: rows of the step, group by group; what is past them is 0
    starts: NDArray[np.int32]  # [num_sequences]


def shared_prefixes(
    tables: NDArray[np.int32],  # [num_sequences, max_blocks]; what is past a sequence's blocks may be anything
    known: NDArray[np.int64],  # [num_sequences]: tokens of the context before the step's rows
    block_size: int,
) -> list[Prefix]:
    """The prefixes that save LEAST_SAVED tokens together, or none."""
    step = math.lcm(block_size, UNIT) // block_size  # blocks
    usable = known // (step * block_size) * step
    candidates = np.flatnonzero(usable * block_size >= SHORTEST)
    if len(candidates) < 2:
        return []
    # What decides most often: nobody has the same block where the shortest prefix ends.
    _, inverse, counts = np.unique(tables[candidates, SHORTEST // block_size - 1], return_inverse=True, return_counts=True)
    candidates = candidates[counts[inverse] > 1]
    if len(candidates) == 0:
        return []
    usable = usable[candidates]
    own = tables[candidates, : usable.max()].astype(np.int32)
    own[np.arange(own.shape[1]) >= usable[:, None]] = -1
    order = np.argsort(np.ascontiguousarray(own).view(np.dtype((np.void, own.shape[1] * 4)))[:, 0], kind="stable")
    own = own[order]
    differs = np.pad((own[1:] != own[:-1]) | (own[1:] < 0), ((0, 0), (0, 1)), constant_values=True)
    common = differs.argmax(1) // step * step * block_size  # [candidates - 1] tokens that neighbours share
    common[common < SHORTEST] = 0
    runs = _runs(common, 0, len(common))
    if sum(run.saved for run in runs) < LEAST_SAVED:
        return []
    return [Prefix(tuple(sorted(candidates[order[run.first : run.last + 1]].tolist())), run.num_tokens) for run in runs]


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbours first to last, both included."""

    first: int
    last: int
    num_tokens: int

    @property
    def saved(self) -> int:
        return (self.last - self.first) * self.num_tokens


def _runs(common: NDArray[np.int64], first: int, last: int) -> list[_Run]:
    """Of neighbours first to last, of which two share common[i]: those that save the most, divided only where the least is shared."""
    if first == last:
        return []
    least = int(common[first:last].min())
    ends = first + np.flatnonzero(common[first:last] == least)
    parts = [run for a, b in zip((first, *(ends + 1)), (*ends, last), strict=True) for run in _runs(common, int(a), int(b))]
    whole = _Run(first, last, least)
    return [whole] if least and whole.saved >= sum(run.saved for run in parts) else parts


def prefix_columns(
    prefixes: Sequence[Prefix],
    query_begins: NDArray[np.int64],  # [num_sequences + 1]: a sequence's rows of the step
    lanes: NDArray[np.int64],  # [num_sequences]
    capacity: int,  # groups; those that save the least are left out
    num_members: int,  # at least the rows of all members
) -> PrefixColumns:
    begins, ends, contexts, group_lanes = np.zeros((4, capacity), np.int32)
    members, starts = np.zeros(num_members, np.int32), np.zeros(len(lanes), np.int32)
    at = 0
    for i, prefix in enumerate(sorted(prefixes, key=lambda p: -(len(p.members) - 1) * p.num_tokens)[:capacity]):
        rows = np.concatenate([np.arange(query_begins[member], query_begins[member + 1]) for member in prefix.members])
        begins[i], ends[i], contexts[i], group_lanes[i] = at, at + len(rows), prefix.num_tokens, lanes[prefix.members[0]]
        members[at : at + len(rows)] = rows
        starts[list(prefix.members)] = prefix.num_tokens
        at += len(rows)
    return PrefixColumns(begins, ends, contexts, group_lanes, members, starts)
