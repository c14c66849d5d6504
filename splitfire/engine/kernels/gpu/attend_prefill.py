"""`attend_prefill`: causal attention of a prompt's new tokens over cached blocks and themselves. A program for each tile and KV head; it
reads no unit that its tile cannot see. The longest contexts come first, so that the last programs to run are short ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu.flash import E4M3_FACTOR, LOG2_E, attend_tile, format_of, store_rows, tile_rows
from splitfire.engine.kernels.gpu.spans import NO_WINDOW, UNIT, Cut, Spans, first_unit, last_unit, owner_of
from splitfire.engine.pool import LayerCache


def prefill_rows(cache: LayerCache) -> int:
    """Of a tile. Where elements are widened 128 rows spill 96 to 168 bytes a thread, and on GPUs before Hopper where a vector has 128 of
    them (ptxas, 2026-11)."""
    elements = cache.elements
    is_older = elements.is_cuda and torch.cuda.get_device_capability(elements.device)[0] < 9
    return 64 if cache.scales is not None or (is_older and elements.shape[-1] > 64) else 128


def prefill_tile_tokens(group: int, cache: LayerCache) -> int:
    return max(1, prefill_rows(cache) // group)


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
    elements, scales = cache.elements, cache.scales
    num_kv_heads, block_size, head_dim = elements.shape[2:]
    group = q.shape[1] // num_kv_heads
    raw_format = format_of(cache)
    raw = elements.view(torch.uint8) if raw_format == 2 else elements
    factor = scale * LOG2_E * (E4M3_FACTOR if raw_format == 2 else 1.0)
    strides = (elements.stride(0), elements.stride(1), 0, 0) if scales is None else (*elements.stride()[:2], *scales.stride()[:2])
    if num_tiles == 0:
        return
    rows = max(prefill_rows(cache), triton.next_power_of_2(group))
    places = (
        spans.begins,
        spans.ends,
        spans.contexts,
        spans.lanes,
        spans.tables,
        spans.tables.stride(0),
        cut.tile_ends,
        spans.capacity,
    )
    _attend[num_tiles, num_kv_heads](
        q, q.stride(0), out, raw, scales, *places, factor, window or NO_WINDOW, *strides,
        raw_format, group, rows, block_size, UNIT, head_dim, triton.next_power_of_2(head_dim), window is not None,
        num_warps=8, num_stages=3,
    )  # fmt: skip


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
    tile_ends,  # [capacity]
    capacity,
    factor,
    window,
    block_stride,
    side_stride,
    scale_block_stride,
    scale_side_stride,
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
    total = tl.load(tile_ends + capacity - 1)
    number = total - 1 - tl.program_id(0)
    if number >= 0:
        sequence = owner_of(number, tile_ends, capacity)
        base = tl.where(sequence > 0, tl.load(tile_ends + tl.maximum(sequence - 1, 0)), 0)
        begin, end = tl.load(begins + sequence), tl.load(ends + sequence)
        context = tl.load(contexts + sequence)
        kv_head = tl.program_id(1)
        token, head, is_there, position = tile_rows(begin, end, context, number - base, kv_head, GROUP, ROWS)
        num_heads = tl.num_programs(1) * GROUP
        q_at = token * q_stride + head * DIM
        q = tl.load(q_rows + q_at[:, None] + d[None, :], is_there[:, None] & (d < DIM)[None, :], 0.0)
        head_scales = scales
        if FORMAT != 0:
            head_scales = scales + kv_head * BLOCK_SIZE
        mixed, _, weight = attend_tile(
            q, position, first_unit(tl.min(position, 0), window, UNIT), last_unit(tl.max(position, 0) + 1, UNIT),
            elements + kv_head * BLOCK_SIZE * DIM, head_scales, tables + tl.load(lanes + sequence).to(tl.int64) * table_stride,
            context, factor, window, block_stride, side_stride, scale_block_stride, scale_side_stride,
            FORMAT, BLOCK_SIZE, UNIT, DIM, WIDTH, HAS_WINDOW,
        )  # fmt: skip
        store_rows(out, mixed, weight, token, head, is_there, num_heads, FORMAT, DIM, WIDTH)
