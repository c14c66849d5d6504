"""Attention of a tile of rows over some units of one sequence's context, one KV head, straight from the paged pool.

Softmax goes along with the units (Milakov and Gimelshein 2018; Dao 2023) and in powers of two. Queries of a group share a tile, row
by row within a token. Scales of a quantised pool stay out of the products: those of keys multiply scores, those of values the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from splitfire.engine.pool import LayerCache

LOG2_E = 1.4426950408889634
PLAIN, INT8, E4M3 = 0, 1, 2  # formats of a pool's elements
E4M3_FACTOR = 256.0  # what widen() leaves out of e4m3


def format_of(cache: LayerCache) -> int:
    if cache.scales is None:
        return PLAIN
    return INT8 if cache.elements.dtype.itemsize == 1 and not cache.elements.dtype.is_floating_point else E4M3


@triton.jit
def widen(x, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of a pool in the dtype of products. e4m3 comes as bytes and moves into the places of fp16, whose exponent counts 8 more."""
    if FORMAT == 2:
        size = (x & 0x7F).to(tl.uint16) << 7
        sign = (x & 0x80).to(tl.uint16) << 8
        return (size | sign).to(tl.float16, bitcast=True).to(DTYPE)
    return x.to(DTYPE)


@triton.jit
def tile_rows(
    begin,  # first row of the sequence
    end,  # one past its last
    context,
    tile,  # of the sequence
    kv_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of a tile: where each reads and writes (a number of vectors), whether it is there, and its token's position."""
    row = tl.arange(0, ROWS)
    token = begin + tile * (ROWS // GROUP) + row // GROUP
    is_there = (row < ROWS // GROUP * GROUP) & (token < end)
    token = tl.minimum(token, end - 1)
    return token.to(tl.int64), kv_head * GROUP + row % GROUP, is_there, context - end + token


@triton.jit
def attend_units(
    q,  # [ROWS, WIDTH]
    positions,  # [ROWS] of their tokens
    mixed,  # [ROWS, WIDTH] fp32 so far
    top,  # [ROWS] largest score so far, in powers of two
    weight,  # [ROWS] sum of 2^(score - top) so far
    first,  # unit
    last,  # one past the last unit
    keys,  # this head's in block 0: [BLOCK_SIZE, DIM], blocks `block_stride` apart; values lie `side_stride` further
    scales,  # likewise [BLOCK_SIZE]
    table,  # block ids of the sequence
    context,
    factor,  # of scores, times log2(e)
    window,
    block_stride,
    side_stride,
    scale_block_stride,
    scale_side_stride,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM up to a power of two
    IS_WHOLE: tl.constexpr,  # every row sees every token of these units
):
    d = tl.arange(0, WIDTH)
    for unit in range(first, last):
        token = unit * UNIT + tl.arange(0, UNIT)
        is_there = token < context
        block = tl.load(table + token // BLOCK_SIZE, is_there, 0).to(tl.int64)
        at = block * block_stride + (token % BLOCK_SIZE) * DIM
        is_element = is_there & (token >= 0)
        key = tl.load(keys + at[None, :] + d[:, None], is_element[None, :] & (d < DIM)[:, None], 0)
        scores = tl.dot(q, widen(key, FORMAT, q.dtype), input_precision="ieee") * factor
        if FORMAT != 0:
            scale_at = scales + block * scale_block_stride + token % BLOCK_SIZE
            scores *= tl.load(scale_at, is_there, 0.0).to(tl.float32)[None, :]
        if not IS_WHOLE:
            sees = (token[None, :] <= positions[:, None]) & (token[None, :] > positions[:, None] - window)
            scores = tl.where(sees, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        weight = weight * keep + tl.sum(weights, 1)
        top = new_top
        value = widen(
            tl.load(keys + side_stride + at[:, None] + d[None, :], is_element[:, None] & (d < DIM)[None, :], 0), FORMAT, q.dtype
        )
        if FORMAT != 0:
            value_scale = tl.load(scale_at + scale_side_stride, is_there, 0.0).to(tl.float32)
        if not IS_WHOLE:
            # A weight of zero does not hide what is not a number: a row must not know it of a later token, which may be a wrong draft's.
            is_bad = tl.max(tl.where(value - value == 0, 0, 1), 1) > 0
            if FORMAT != 0:
                is_bad = is_bad | (value_scale != value_scale)
                value_scale = tl.where(is_bad, 0.0, value_scale)
            value = tl.where(is_bad[:, None], 0.0, value).to(q.dtype)
            weight = tl.where(tl.max(tl.where(sees & is_bad[None, :], 1, 0), 1) > 0, float("nan"), weight)
        if FORMAT != 0:
            weights *= value_scale[None, :]
        mixed = tl.dot(weights.to(q.dtype), value, mixed * keep[:, None], input_precision="ieee")
    return mixed, top, weight


@triton.jit
def attend_tile(
    q, positions, first, last, keys, scales, table, context, factor, window,
    block_stride, side_stride, scale_block_stride, scale_side_stride,
    FORMAT: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """attend_units of [first, last) from nothing: first those that every row sees whole, then the others."""
    ROWS: tl.constexpr = q.shape[0]
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    middle = first
    if not HAS_WINDOW:
        middle = tl.minimum(tl.maximum((tl.min(positions, 0) + 1) // UNIT, first), last)
        mixed, top, weight = attend_units(
            q, positions, mixed, top, weight, first, middle, keys, scales, table, context, factor, window,
            block_stride, side_stride, scale_block_stride, scale_side_stride, FORMAT, BLOCK_SIZE, UNIT, DIM, WIDTH, True,
        )  # fmt: skip
    return attend_units(
        q, positions, mixed, top, weight, middle, last, keys, scales, table, context, factor, window,
        block_stride, side_stride, scale_block_stride, scale_side_stride, FORMAT, BLOCK_SIZE, UNIT, DIM, WIDTH, False,
    )  # fmt: skip


@triton.jit
def store_rows(out, mixed, weight, token, head, is_there, num_heads, FORMAT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Weighted values divided by their weight, to [num_tokens, num_heads, DIM]."""
    d = tl.arange(0, WIDTH)
    if FORMAT == 2:
        mixed *= 256.0  # E4M3_FACTOR
    at = (token * num_heads + head) * DIM
    result = mixed / weight[:, None]
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), is_there[:, None] & (d < DIM)[None, :])
