"""`attend_prefill`: causal attention of a prompt's new tokens over cached blocks and themselves. A program for each tile and KV head; it
reads no unit that its tile cannot see. The longest contexts come first, so that the last programs to run are short ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu import chips
from splitfire.engine.kernels.gpu.arguments import AttentionLaunch
from splitfire.engine.kernels.gpu.chips import Chip
from splitfire.engine.kernels.gpu.flash import attend_tile, no_units, store_rows, tile_rows
from splitfire.engine.kernels.gpu.spans import Cut, Places, Spans, first_unit, last_unit, owner_of
from splitfire.engine.pool import LayerCache


def prefill_rows(is_quantised: bool, head_dim: int, chip: Chip) -> int:
    """Of a tile. Where elements are widened 128 rows spill 96 to 168 bytes a thread, and on GPUs before Hopper where a vector has 128 of
    them (ptxas, 2026-11)."""
    return 64 if is_quantised or (chip != "sm_90" and head_dim > 64) else 128


def prefill_warps(is_quantised: bool, head_dim: int, has_window: bool, chip: Chip) -> int:
    """Of heads of 64 that are widened and have a window eight spill 4 bytes a thread on sm_80 (four 8 without one), and on gfx942 up to 320
    of others (ptxas and LLVM, 2026-11)."""
    return 4 if chip == "gfx942" or (chip == "sm_80" and is_quantised and head_dim <= 64 and has_window) else 8


def prefill_tile_tokens(group: int, cache: LayerCache) -> int:
    rows = prefill_rows(cache.scales is not None, cache.elements.shape[-1], chips.chip_of(cache.elements.device))
    return max(1, rows // group)


def attend_prefill(
    q: Tensor,  # [num_tokens, num_heads, head_dim], a token's heads one after the other
    cache: LayerCache,
    spans: Spans,
    cut: Cut,  # of these spans, with `prefill_tile_tokens` and this window
    num_tiles: int,  # at least those of the cut
    scale: float,
    window: int | None,
    out: Tensor,  # [num_tokens, num_heads, head_dim], written where sequences have rows
) -> None:
    """../attention.py's `attend`."""
    launch = AttentionLaunch.of(q, cache, Places.of(spans, cut, cut.tile_ends), scale, window, out)
    is_quantised, head_dim, chip = cache.scales is not None, cache.elements.shape[-1], chips.chip_of(cache.elements.device)
    rows = max(prefill_rows(is_quantised, head_dim, chip), triton.next_power_of_2(launch.constants["GROUP"]))
    warps = prefill_warps(is_quantised, head_dim, window is not None, chip)
    if num_tiles:
        _attend[num_tiles, launch.what.num_kv_heads](
            launch.what, ROWS=rows, **launch.constants, num_warps=warps, num_stages=2 if chip == "gfx942" else 3
        )


@triton.jit
def _attend(
    what,  # flash.Attention
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    number = tl.load(what.places.item_ends + what.places.capacity - 1) - 1 - tl.program_id(0)
    if number < 0:
        return
    sequence, tile = owner_of(number, what.places)
    kv_head = tl.program_id(1)
    token, head, is_there, position, least, largest = tile_rows(what, sequence, tile, kv_head, GROUP, ROWS)
    first, last = first_unit(least, what.window), last_unit(largest + 1)
    mixed, top, weight = no_units(ROWS, WIDTH)
    mixed, top, weight = attend_tile(
        what, sequence, kv_head, token, head, is_there, position, least, mixed, top, weight, first, last,
        FORMAT, BLOCK_SIZE, DIM, WIDTH, HAS_WINDOW,
    )  # fmt: skip
    store_rows(what, mixed, weight, token, head, is_there, FORMAT, GROUP, DIM, WIDTH)
