"""`attend_decode`: attention of a few new tokens for each of many sequences, whatever their lengths: as many programs as multiprocessors,
and every program reads the same amount of KV (spans.py).

Where a program's piece begins or ends within an item (a tile of rows and a KV head), it leaves that item's state; the program in whose
piece the item begins merges them afterwards (log-sum-exp, Dao 2023). Nothing here depends on the host: a CUDA graph may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu.flash import E4M3_FACTOR, LOG2_E, attend_tile, format_of, store_rows, tile_rows
from splitfire.engine.kernels.gpu.spans import NO_WINDOW, UNIT, Cut, Spans, first_unit, last_unit, owner_of
from splitfire.engine.pool import LayerCache


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Rows of a tile (at least 16, the least of a tensor core's product) and how many programs there are."""

    rows: int
    programs: int

    def tile_tokens(self, group: int) -> int:
        return max(1, self.rows // group)


def decode_shape(group: int, most_rows: int, num_multiprocessors: int) -> DecodeShape:
    """For sequences of at most `most_rows` new tokens each. 64 rows of fp32 sums are what registers hold without spilling."""
    wanted = triton.next_power_of_2(group * most_rows)
    return DecodeShape(max(triton.next_power_of_2(group), min(64, max(16, wanted))), num_multiprocessors)


@dataclass(frozen=True, slots=True)
class Partials:
    """Two of each program: of the item its piece begins in, and of the one it ends in."""

    mixed: Tensor  # [programs, 2, rows, width] fp32
    states: Tensor  # [programs, 2, 2, rows] fp32: largest score, weight

    @staticmethod
    def of(shape: DecodeShape, head_dim: int, device: torch.device) -> Partials:
        width = triton.next_power_of_2(head_dim)
        return Partials(
            torch.empty(shape.programs, 2, shape.rows, width, device=device),
            torch.empty(shape.programs, 2, 2, shape.rows, device=device),
        )


def num_warps(cache: LayerCache, rows: int) -> int:
    """Of `attend_decode`. With four, 64 rows spill up to 264 bytes a thread on sm_80, and widening into vectors of 128 spills 8 on sm_90
    (ptxas, 2026-11)."""
    return 8 if rows >= 64 or (cache.scales is not None and cache.elements.shape[-1] > 64) else 4


def attend_decode(
    q: Tensor,  # [num_tokens, num_heads, head_dim], a token's heads one after the other
    cache: LayerCache,
    spans: Spans,
    cut: Cut,  # of these spans, with `shape`'s tiles and this window
    shape: DecodeShape,
    partials: Partials,  # overwritten
    scale: float,
    window: int | None,
    out: Tensor,  # [num_tokens, num_heads, head_dim], written where sequences have rows
) -> None:
    """../attention.py's `attend`."""
    elements, scales = cache.elements, cache.scales
    num_kv_heads, block_size, head_dim = elements.shape[2:]
    group = q.shape[1] // num_kv_heads
    raw_format = format_of(cache)
    raw = elements.view(torch.uint8) if raw_format == 2 else elements
    width = triton.next_power_of_2(head_dim)
    factor = scale * LOG2_E * (E4M3_FACTOR if raw_format == 2 else 1.0)
    strides = (elements.stride(0), elements.stride(1), 0, 0) if scales is None else (*elements.stride()[:2], *scales.stride()[:2])
    places = (
        spans.begins,
        spans.ends,
        spans.contexts,
        spans.lanes,
        spans.tables,
        spans.tables.stride(0),
        cut.unit_ends,
        spans.capacity,
    )
    _attend[shape.programs,](
        q, q.stride(0), out, raw, scales, *places, partials.mixed, partials.states, factor, window or NO_WINDOW, *strides, num_kv_heads,
        raw_format, group, shape.rows, block_size, UNIT, head_dim, width, window is not None, num_warps=num_warps(cache, shape.rows),
    )  # fmt: skip
    _merge[shape.programs,](
        out, spans.begins, spans.ends, spans.contexts, cut.unit_ends, spans.capacity, partials.mixed, partials.states, window or NO_WINDOW,
        raw_format, num_kv_heads, group, shape.rows, UNIT, head_dim, width,
    )  # fmt: skip


@triton.jit
def _piece(unit_ends, capacity):
    """The units of this program."""
    total = tl.load(unit_ends + capacity - 1)
    each = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    begin = tl.minimum(tl.program_id(0) * each, total)
    return begin, tl.minimum(begin + each, total), each


@triton.jit
def _attend(
    q_rows,  # [num_tokens, num_heads, DIM], tokens `q_stride` apart
    q_stride,
    out,  # [num_tokens, num_heads, DIM]
    elements,  # the layer's, of block 0
    scales,
    begins,  # [capacity]
    ends,  # [capacity]
    contexts,  # [capacity]
    lanes,  # [capacity]
    tables,  # [num_lanes, max_blocks]
    table_stride,
    unit_ends,  # [capacity]
    capacity,
    partial_mixed,  # [programs, 2, ROWS, WIDTH]
    partial_states,  # [programs, 2, 2, ROWS]
    factor,
    window,
    block_stride,
    side_stride,
    scale_block_stride,
    scale_side_stride,
    num_kv_heads,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    start, stop, _ = _piece(unit_ends, capacity)
    at = start
    while at < stop:
        sequence = owner_of(at, unit_ends, capacity)
        base = tl.where(sequence > 0, tl.load(unit_ends + tl.maximum(sequence - 1, 0)), 0)
        begin, end = tl.load(begins + sequence), tl.load(ends + sequence)
        context = tl.load(contexts + sequence)
        low = first_unit(context - (end - begin), window, UNIT)
        units = last_unit(context, UNIT) - low
        item = (at - base) // units
        first = (at - base) % units
        last = tl.minimum(units, first + stop - at)
        tile, kv_head = item // num_kv_heads, item % num_kv_heads
        token, head, is_there, position = tile_rows(begin, end, context, tile, kv_head, GROUP, ROWS)
        q_at = token * q_stride + head * DIM
        q = tl.load(q_rows + q_at[:, None] + d[None, :], is_there[:, None] & (d < DIM)[None, :], 0.0)
        head_scales = scales
        if FORMAT != 0:
            head_scales = scales + kv_head * BLOCK_SIZE
        mixed, top, weight = attend_tile(
            q, position, low + first, low + last, elements + kv_head * BLOCK_SIZE * DIM, head_scales,
            tables + tl.load(lanes + sequence).to(tl.int64) * table_stride, context, factor, window,
            block_stride, side_stride, scale_block_stride, scale_side_stride, FORMAT, BLOCK_SIZE, UNIT, DIM, WIDTH, HAS_WINDOW,
        )  # fmt: skip
        if (first == 0) & (last == units):
            store_rows(out, mixed, weight, token, head, is_there, num_kv_heads * GROUP, FORMAT, DIM, WIDTH)
        else:
            place = tl.program_id(0) * 2 + (at != start).to(tl.int32)
            tl.store(partial_mixed + (place * ROWS + row)[:, None] * WIDTH + d[None, :], mixed)
            tl.store(partial_states + place * 2 * ROWS + row, top)
            tl.store(partial_states + (place * 2 + 1) * ROWS + row, weight)
        at += last - first


@triton.jit
def _merge(
    out,  # [num_tokens, num_heads, DIM]
    begins,
    ends,
    contexts,
    unit_ends,
    capacity,
    partial_mixed,
    partial_states,
    window,
    FORMAT: tl.constexpr,
    num_kv_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The item that begins in this program's piece and does not end there."""
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    start, stop, each = _piece(unit_ends, capacity)
    if stop > start:
        sequence = owner_of(stop - 1, unit_ends, capacity)
        base = tl.where(sequence > 0, tl.load(unit_ends + tl.maximum(sequence - 1, 0)), 0)
        begin, end = tl.load(begins + sequence), tl.load(ends + sequence)
        context = tl.load(contexts + sequence)
        units = last_unit(context, UNIT) - first_unit(context - (end - begin), window, UNIT)
        item = (stop - 1 - base) // units
        item_start = base + item * units
        item_stop = item_start + units
        if (item_stop > stop) & (item_start >= start):
            mixed = tl.zeros([ROWS, WIDTH], tl.float32)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            weight = tl.zeros([ROWS], tl.float32)
            place = tl.program_id(0) * 2 + (item_start != start).to(tl.int32)
            pieces = (item_stop - 1) // each - tl.program_id(0) + 1
            for _piece_of_it in range(pieces):
                part_mixed = tl.load(partial_mixed + (place * ROWS + row)[:, None] * WIDTH + d[None, :])
                part_top = tl.load(partial_states + place * 2 * ROWS + row)
                part_weight = tl.load(partial_states + (place * 2 + 1) * ROWS + row)
                new_top = tl.maximum(top, part_top)
                base_top = tl.where(new_top == float("-inf"), 0.0, new_top)
                keep, add = tl.exp2(top - base_top), tl.exp2(part_top - base_top)
                mixed = mixed * keep[:, None] + part_mixed * add[:, None]
                weight = weight * keep + part_weight * add
                top = new_top
                place = place // 2 * 2 + 2  # the next program began in it
            tile, kv_head = item // num_kv_heads, item % num_kv_heads
            token, head, is_there, position = tile_rows(begin, end, context, tile, kv_head, GROUP, ROWS)
            store_rows(out, mixed, weight, token, head, is_there, num_kv_heads * GROUP, FORMAT, DIM, WIDTH)
