"""A step's sequences on the device, and how attention cuts them up: once a step, by a kernel, for all layers with one window.

A sequence's new tokens are cut into *tiles* of `tile_tokens`, its context into *units* of UNIT tokens. Attention of one tile and one
KV head is an *item*; its units lie one after the other, items of a sequence too, and sequences. So a number in [0, all units) says whose
turn it is, and equal pieces of that range are equal amounts of KV to read, however long the sequences are (Stream-K, Osama et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = 64  # tokens
UNIT_TOKENS: tl.constexpr = tl.constexpr(UNIT)  # as kernels know it
NO_WINDOW = 1 << 30


@dataclass(frozen=True, slots=True)
class Spans:
    """`capacity` places for sequences; one without rows is empty."""

    begins: Tensor  # [capacity] int32: rows [begins[i], ends[i]) of the step are of sequence i
    ends: Tensor  # [capacity] int32
    contexts: Tensor  # [capacity] int32: tokens to attend to, those rows included
    lanes: Tensor  # [capacity] int32: the blocks of sequence i are tables[lanes[i], : ceil(contexts[i] / block_size)]
    tables: Tensor  # [num_lanes, max_blocks] int32
    # [num_members] int32, rows of the step, of groups of sequences (attend_shared.py): their begins and ends are places in it, and every
    # row sees all of the context. None: rows are their own places.
    members: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.contexts.shape[0]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where each sequence's tiles and units end, those of the sequences before it included."""

    tile_ends: Tensor  # [capacity] int32
    unit_ends: Tensor  # [capacity] int32
    starts: Tensor | None = None  # [capacity] int32: the first token of the context whose units are counted; None: 0 of all


class Places(NamedTuple):
    """Spans and their cut as kernels take them: Triton takes tuples apart, not dataclasses."""

    begins: Tensor
    ends: Tensor
    contexts: Tensor
    lanes: Tensor
    tables: Tensor
    table_stride: int
    capacity: int
    starts: Tensor | None
    members: Tensor | None
    item_ends: Tensor  # the cut's unit_ends or tile_ends, whichever a kernel deals out

    @staticmethod
    def of(spans: Spans, cut: Cut, item_ends: Tensor) -> Places:
        return Places(
            spans.begins, spans.ends, spans.contexts, spans.lanes, spans.tables, spans.tables.stride(0), spans.capacity, cut.starts,
            spans.members, item_ends,
        )  # fmt: skip


def cut(spans: Spans, tile_tokens: int, num_kv_heads: int, window: int | None, starts: Tensor | None = None) -> Cut:
    """For attention that takes `tile_tokens` new tokens at a time, of the context from `starts` (multiples of UNIT) on."""
    ends = torch.empty(2, spans.capacity, dtype=torch.int32, device=spans.contexts.device)
    _cut[1,](
        spans.begins, spans.ends, spans.contexts, starts, ends[0], ends[1], spans.capacity, tile_tokens, num_kv_heads,
        window or NO_WINDOW, triton.next_power_of_2(spans.capacity),
    )  # fmt: skip
    return Cut(ends[0], ends[1], starts)


@triton.jit
def _cut(
    begins,  # [capacity]
    ends,  # [capacity]
    contexts,  # [capacity]
    starts,  # [capacity] or None
    tile_ends,  # [capacity], written
    unit_ends,  # [capacity], written
    capacity,
    tile_tokens,
    num_kv_heads,
    window,
    PLACES: tl.constexpr,
):
    place = tl.arange(0, PLACES)
    is_there = place < capacity
    rows = tl.load(ends + place, is_there, 0) - tl.load(begins + place, is_there, 0)
    tiles = (rows + tile_tokens - 1) // tile_tokens
    context = tl.load(contexts + place, is_there, 0)
    first = first_unit(context - rows, window)
    if starts is not None:
        first = tl.maximum(first, tl.load(starts + place, is_there, 0) // UNIT_TOKENS)
    units = tl.where(rows > 0, last_unit(context) - first, 0)
    tl.store(tile_ends + place, tl.cumsum(tiles, 0), is_there)
    tl.store(unit_ends + place, tl.cumsum(tiles * num_kv_heads * units, 0), is_there)


@triton.jit
def first_unit(position, window):
    """That the token at `position` sees."""
    return tl.maximum(position - window + 1, 0) // UNIT_TOKENS


@triton.jit
def last_unit(context):
    """One past it."""
    return (context + UNIT_TOKENS - 1) // UNIT_TOKENS


@triton.jit
def owner_of(number, places):
    """-> the sequence to which item or unit `number` belongs, the first that ends after it; which of the sequence's own it is."""
    low, high = 0, places.capacity
    while low < high:
        middle = (low + high) // 2
        is_after = tl.load(places.item_ends + middle) > number
        high = tl.where(is_after, middle, high)
        low = tl.where(is_after, low, middle + 1)
    return low, number - tl.where(low > 0, tl.load(places.item_ends + tl.maximum(low - 1, 0)), 0)


@triton.jit
def units_of(sequence, places, window):
    """-> the first unit that one of its rows sees, and how many there are from it on."""
    context = tl.load(places.contexts + sequence)
    rows = tl.load(places.ends + sequence) - tl.load(places.begins + sequence)
    first = first_unit(context - rows, window)
    if places.starts is not None:
        first = tl.maximum(first, tl.load(places.starts + sequence) // UNIT_TOKENS)
    return first, last_unit(context) - first
