"""A step's sequences on the device, and how attention cuts them up: once a step, by a kernel, for all layers with one window.

A sequence's new tokens are cut into *tiles* of `tile_tokens`, its context into *units* of UNIT tokens. Attention of one tile and one
KV head is an *item*; its units lie one after the other, items of a sequence too, and sequences. So a number in [0, all units) says whose
turn it is, and equal pieces of that range are equal amounts of KV to read, however long the sequences are (Stream-K, Osama et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = 64  # tokens
NO_WINDOW = 1 << 30


@dataclass(frozen=True, slots=True)
class Spans:
    """`capacity` places for sequences; one without rows is empty."""

    begins: Tensor  # [capacity] int32: rows [begins[i], ends[i]) of the step are of sequence i
    ends: Tensor  # [capacity] int32
    contexts: Tensor  # [capacity] int32: tokens to attend to, those rows included
    lanes: Tensor  # [capacity] int32: the blocks of sequence i are tables[lanes[i], : ceil(contexts[i] / block_size)]
    tables: Tensor  # [num_lanes, max_blocks] int32

    @property
    def capacity(self) -> int:
        return self.contexts.shape[0]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where each sequence's tiles and units end, those of the sequences before it included."""

    tile_ends: Tensor  # [capacity] int32
    unit_ends: Tensor  # [capacity] int32


def cut(spans: Spans, tile_tokens: int, num_kv_heads: int, window: int | None) -> Cut:
    """For attention that takes `tile_tokens` new tokens at a time."""
    ends = torch.empty(2, spans.capacity, dtype=torch.int32, device=spans.contexts.device)
    _cut[1,](
        spans.begins, spans.ends, spans.contexts, ends[0], ends[1], spans.capacity, tile_tokens, num_kv_heads, window or NO_WINDOW,
        UNIT, triton.next_power_of_2(spans.capacity),
    )  # fmt: skip
    return Cut(ends[0], ends[1])


@triton.jit
def _cut(
    begins,  # [capacity]
    ends,  # [capacity]
    contexts,  # [capacity]
    tile_ends,  # [capacity], written
    unit_ends,  # [capacity], written
    capacity,
    tile_tokens,
    num_kv_heads,
    window,
    UNIT: tl.constexpr,
    PLACES: tl.constexpr,
):
    place = tl.arange(0, PLACES)
    is_there = place < capacity
    rows = tl.load(ends + place, is_there, 0) - tl.load(begins + place, is_there, 0)
    tiles = (rows + tile_tokens - 1) // tile_tokens
    context = tl.load(contexts + place, is_there, 0)
    units = tl.where(rows > 0, last_unit(context, UNIT) - first_unit(context - rows, window, UNIT), 0)
    tl.store(tile_ends + place, tl.cumsum(tiles, 0), is_there)
    tl.store(unit_ends + place, tl.cumsum(tiles * num_kv_heads * units, 0), is_there)


@triton.jit
def first_unit(position, window, UNIT: tl.constexpr):
    """That the token at `position` sees."""
    return tl.maximum(position - window + 1, 0) // UNIT


@triton.jit
def last_unit(context, UNIT: tl.constexpr):
    """One past it."""
    return (context + UNIT - 1) // UNIT


@triton.jit
def owner_of(number, ends, capacity):
    """The sequence to which a tile or a unit belongs: the first that ends after it."""
    low, high = 0, capacity
    while low < high:
        middle = (low + high) // 2
        is_after = tl.load(ends + middle) > number
        high = tl.where(is_after, middle, high)
        low = tl.where(is_after, low, middle + 1)
    return low
