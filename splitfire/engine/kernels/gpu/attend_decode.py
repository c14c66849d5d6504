"""`attend_decode`: attention of a few new tokens for each of many sequences, whatever their lengths: as many programs as multiprocessors,
and every program reads the same amount of KV (spans.py).

Where a program's piece begins or ends within an item (a tile of rows and a KV head), it leaves that item's state; the program in whose
piece the item begins merges them afterwards (log-sum-exp, Dao 2023). Nothing here depends on the host: a CUDA graph may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu import chips
from splitfire.engine.kernels.gpu.arguments import AttentionLaunch
from splitfire.engine.kernels.gpu.chips import Chip
from splitfire.engine.kernels.gpu.flash import attend_tile, no_units, tile_rows
from splitfire.engine.kernels.gpu.row_states import RowStates, before_units, finish
from splitfire.engine.kernels.gpu.spans import Cut, Places, Spans, owner_of, units_of
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


class Partials(NamedTuple):
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


def num_warps(is_quantised: bool, head_dim: int, rows: int, chip: Chip) -> int:
    """Of `attend_decode`. With four, what has eight spills 8 to 264 bytes a thread on sm_90 or sm_80; with eight a thread of gfx942 has 256
    registers instead of 512, and up to 520 bytes spill (ptxas and LLVM, 2026-11)."""
    if chip == "gfx942":
        return 4
    return 8 if rows >= 32 or (is_quantised and head_dim > 64) else 4


def num_stages(is_quantised: bool, head_dim: int, rows: int, chip: Chip) -> int:
    """Three keep a unit on its way while another is worked on: 32 KB of bf16 heads of 128, what a multiprocessor of an H200 needs under way
    (4.8 TB/s by 0.8 us, 132 of them; not measured). Five keep two, of which units of half the bytes have need."""
    if chip == "gfx942":
        return 2
    return 5 if chip == "sm_90" and rows < 64 and (is_quantised or head_dim <= 64) else 3


def merge_warps(rows: int, width: int) -> int:
    """A thread has 8 numbers: with 16 it spills 8 bytes on sm_90 (ptxas, 2026-11). 32 warps are the most there are."""
    return min(32, max(1, rows * width // (32 * 8)))


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
    shared: RowStates | None = None,  # what rows of sequences with a start in the cut know of what is before it
) -> None:
    """../attention.py's `attend`."""
    assert (shared is None) == (cut.starts is None)
    launch = AttentionLaunch.of(q, cache, Places.of(spans, cut, cut.unit_ends), scale, window, out)
    launch_decode(launch, cache, shape, partials, shared)


def launch_decode(
    launch: AttentionLaunch, cache: LayerCache, shape: DecodeShape, partials: Partials, shared: RowStates | None
) -> None:
    """Both kernels. `shared` is what spans of groups write and other spans begin with."""
    constants, chip = launch.constants, chips.chip_of(cache.elements.device)
    choice = (cache.scales is not None, cache.elements.shape[-1], shape.rows, chip)
    _attend[shape.programs,](
        launch.what, partials, shared, ROWS=shape.rows, **constants, num_warps=num_warps(*choice), num_stages=num_stages(*choice)
    )
    known = {key: constants[key] for key in ("FORMAT", "GROUP", "DIM", "WIDTH")}
    warps = merge_warps(shape.rows, constants["WIDTH"])
    _merge[shape.programs,](launch.what, partials, shared, ROWS=shape.rows, **known, num_warps=warps)


@triton.jit
def piece(places):
    """The units of this program."""
    total = tl.load(places.item_ends + places.capacity - 1)
    each = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    begin = tl.minimum(tl.program_id(0) * each, total)
    return begin, tl.minimum(begin + each, total), each


@triton.jit
def _attend(
    what,  # flash.Attention
    partials,
    shared,  # RowStates or None
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    start, stop, _ = piece(what.places)
    at = start
    while at < stop:
        sequence, unit = owner_of(at, what.places)
        low, units = units_of(sequence, what.places, what.window)
        item, first = unit // units, unit % units
        last = tl.minimum(units, first + stop - at)
        tile, kv_head = item // what.num_kv_heads, item % what.num_kv_heads
        token, head, is_there, position, least, _last = tile_rows(what, sequence, tile, kv_head, GROUP, ROWS)
        mixed, top, weight = before_units(what, shared, sequence, first, token, head, is_there, GROUP, ROWS, DIM, WIDTH)
        mixed, top, weight = attend_tile(
            what, sequence, kv_head, token, head, is_there, position, least, mixed, top, weight, low + first, low + last,
            FORMAT, BLOCK_SIZE, DIM, WIDTH, HAS_WINDOW,
        )  # fmt: skip
        if (first == 0) & (last == units):
            finish(what, shared, mixed, top, weight, token, head, is_there, FORMAT, GROUP, DIM, WIDTH)
        else:
            place = tl.program_id(0) * 2 + (at != start).to(tl.int32)
            tl.store(partials.mixed + (place * ROWS + row)[:, None] * WIDTH + d[None, :], mixed)
            tl.store(partials.states + place * 2 * ROWS + row, top)
            tl.store(partials.states + (place * 2 + 1) * ROWS + row, weight)
        at += last - first


@triton.jit
def _merge(
    what,
    partials,
    shared,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The item that begins in this program's piece and does not end there."""
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    start, stop, each = piece(what.places)
    if stop > start:
        sequence, unit = owner_of(stop - 1, what.places)
        low, units = units_of(sequence, what.places, what.window)
        item = unit // units
        item_start = stop - 1 - unit % units
        item_stop = item_start + units
        if (item_stop > stop) & (item_start >= start):
            mixed, top, weight = no_units(ROWS, WIDTH)
            place = tl.program_id(0) * 2 + (item_start != start).to(tl.int32)
            pieces = (item_stop - 1) // each - tl.program_id(0) + 1
            for _piece_of_it in range(pieces):
                part_mixed = tl.load(partials.mixed + (place * ROWS + row)[:, None] * WIDTH + d[None, :])
                part_top = tl.load(partials.states + place * 2 * ROWS + row)
                part_weight = tl.load(partials.states + (place * 2 + 1) * ROWS + row)
                new_top = tl.maximum(top, part_top)
                base_top = tl.where(new_top == float("-inf"), 0.0, new_top)
                keep, add = tl.exp2(top - base_top), tl.exp2(part_top - base_top)
                mixed = mixed * keep[:, None] + part_mixed * add[:, None]
                weight = weight * keep + part_weight * add
                top = new_top
                place = place // 2 * 2 + 2  # the next program began in it
            tile, kv_head = item // what.num_kv_heads, item % what.num_kv_heads
            token, head, is_there, position, least, _last = tile_rows(what, sequence, tile, kv_head, GROUP, ROWS)
            finish(what, shared, mixed, top, weight, token, head, is_there, FORMAT, GROUP, DIM, WIDTH)
