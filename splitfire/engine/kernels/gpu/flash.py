"""Attention of a tile of rows over some units of one sequence's context, one KV head, straight from the paged pool.

Softmax goes along with the units (Milakov and Gimelshein 2018; Dao 2023) and in powers of two. Queries of a group share a tile, row
by row within a token. Scales of a quantised pool stay out of the products: those of keys multiply scores, those of values the weights.
int8 and e4m3 are widened to the dtype of queries before they are multiplied, and sums are fp32: the second level of sums that fp8
products need on Hopper, which add up in 22 bits, has nothing to do here.
Loads are plain ones, not TMA: a unit may lie in several blocks, of which a descriptor gives one at a time, and no tile is made of parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from splitfire.engine.kernels.gpu.arguments import E4M3, E4M3_FACTOR, PLAIN
from splitfire.engine.kernels.gpu.quantise import e4m3_as_half
from splitfire.engine.kernels.gpu.spans import UNIT_TOKENS


@triton.jit
def widen(x, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of a pool in the dtype of products; of e4m3's bytes what E4M3_FACTOR is still to be taken in of."""
    if FORMAT == E4M3:
        return e4m3_as_half(x).to(DTYPE)
    return x.to(DTYPE)


@triton.jit
def tile_rows(what, sequence, tile, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a sequence's tile: where each reads and writes (token and head), whether it is there, and its token's position; the least
    and the largest of those. (Found by tl.min they would cost dearly: loads of units counted from one are not vectorised, Triton 3.9.)"""
    begin, end = tl.load(what.places.begins + sequence), tl.load(what.places.ends + sequence)
    context = tl.load(what.places.contexts + sequence)
    row = tl.arange(0, ROWS)
    first = begin + tile * (ROWS // GROUP)
    token = first + row // GROUP
    is_there = (row < ROWS // GROUP * GROUP) & (token < end)
    token = tl.minimum(token, end - 1)
    head = kv_head * GROUP + row % GROUP
    if what.places.members is None:
        position = context - end + token
        least = context - end + first
        largest = context - end + tl.minimum(first + ROWS // GROUP, end) - 1
    else:
        token = tl.load(what.places.members + token)
        least, largest = context - 1, context - 1
        position = tl.zeros_like(row) + least
    return token.to(tl.int64), head, is_there, position, least, largest


@triton.jit
def scales_at(unit, scales, block_stride, table, context, BLOCK_SIZE: tl.constexpr):
    """Where a unit's scales are, [runs, tokens of a run]: of tokens in a row, for only loads of 4 bytes and more go ahead of the loop.
    Those past the context are some other token's."""
    RUN: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < UNIT_TOKENS else UNIT_TOKENS
    token = unit * UNIT_TOKENS + tl.arange(0, UNIT_TOKENS // RUN) * RUN
    block = tl.load(table + token // BLOCK_SIZE, token < context, 0).to(tl.int64)
    return scales + (block * block_stride + token % BLOCK_SIZE)[:, None] + tl.arange(0, RUN)[None, :]


@triton.jit
def attend_units(
    q,  # [ROWS, WIDTH]
    positions,  # [ROWS] of their tokens
    mixed,  # [ROWS, WIDTH] fp32 so far
    top,  # [ROWS] largest score so far, in powers of two
    weight,  # [ROWS] sum of 2^(score - top) so far
    first,  # unit
    last,  # one past the last unit
    what,
    keys,  # this head's in block 0: [BLOCK_SIZE, DIM]; values lie a side further
    scales,  # likewise [BLOCK_SIZE]
    table,  # block ids of the sequence
    context,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM up to a power of two
    IS_WHOLE: tl.constexpr,  # every row sees every token of these units
):
    d = tl.arange(0, WIDTH)
    cache = what.cache
    for unit in range(first, last):
        token = unit * UNIT_TOKENS + tl.arange(0, UNIT_TOKENS)
        is_there = token < context
        block = tl.load(table + token // BLOCK_SIZE, is_there, 0).to(tl.int64)
        at = block * cache.block_stride + (token % BLOCK_SIZE) * DIM
        key = tl.load(keys + at[None, :] + d[:, None], is_there[None, :] & (d < DIM)[:, None], 0)
        scores = tl.dot(q, widen(key, FORMAT, q.dtype), input_precision="ieee") * what.factor
        if FORMAT != PLAIN:
            scale_at = scales_at(unit, scales, cache.scale_block_stride, table, context, BLOCK_SIZE)
            scores *= tl.load(scale_at).reshape(UNIT_TOKENS).to(tl.float32)[None, :]
        if not IS_WHOLE:
            sees = (token[None, :] <= positions[:, None]) & (token[None, :] > positions[:, None] - what.window)
            scores = tl.where(sees, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        weight = weight * keep + tl.sum(weights, 1)
        top = new_top
        raw = tl.load(keys + cache.side_stride + at[:, None] + d[None, :], is_there[:, None] & (d < DIM)[None, :], 0)
        value = widen(raw, FORMAT, q.dtype)
        if FORMAT != PLAIN:
            value_scale = tl.load(scale_at + cache.scale_side_stride).reshape(UNIT_TOKENS).to(tl.float32)
        if not IS_WHOLE:
            # A weight of zero does not hide what is not a number: a row must not know it of a later token, which may be a wrong draft's.
            is_bad = tl.max(tl.where(value - value == 0, 0, 1), 1) > 0
            if FORMAT != PLAIN:
                is_bad = is_bad | (value_scale != value_scale)
                value_scale = tl.where(is_bad, 0.0, value_scale)
            value = tl.where(is_bad[:, None], 0.0, value).to(q.dtype)
            weight = tl.where(tl.max(tl.where(sees & is_bad[None, :], 1, 0), 1) > 0, float("nan"), weight)
        if FORMAT != PLAIN:
            weights *= value_scale[None, :]
        mixed = tl.dot(weights.to(q.dtype), value, mixed * keep[:, None], input_precision="ieee")
    return mixed, top, weight


@triton.jit
def attend_tile(
    what, sequence, kv_head, token, head, is_there, positions, least, mixed, top, weight, first, last,
    FORMAT: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """attend_units of [first, last) for a tile's rows: first those units that every row sees whole, then the others."""
    d = tl.arange(0, WIDTH)
    q_at = token * what.q_stride + head * DIM
    q = tl.load(what.q + q_at[:, None] + d[None, :], is_there[:, None] & (d < DIM)[None, :], 0.0)
    keys = what.cache.elements + kv_head * BLOCK_SIZE * DIM
    scales = what.cache.scales
    if FORMAT != PLAIN:
        scales += kv_head * BLOCK_SIZE
    table = what.places.tables + tl.load(what.places.lanes + sequence).to(tl.int64) * what.places.table_stride
    context = tl.load(what.places.contexts + sequence)
    middle = first
    if not HAS_WINDOW:
        middle = tl.minimum(tl.maximum((least + 1) // UNIT_TOKENS, first), last)
        mixed, top, weight = attend_units(
            q, positions, mixed, top, weight, first, middle, what, keys, scales, table, context, FORMAT, BLOCK_SIZE, DIM, WIDTH, True,
        )  # fmt: skip
    if what.places.members is None:
        mixed, top, weight = attend_units(
            q, positions, mixed, top, weight, middle, last, what, keys, scales, table, context, FORMAT, BLOCK_SIZE, DIM, WIDTH, False,
        )  # fmt: skip
    return mixed, top, weight


@triton.jit
def no_units(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """mixed, top and weight of rows that have seen nothing."""
    return tl.zeros([ROWS, WIDTH], tl.float32), tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def store_rows(
    what, mixed, weight, token, head, is_there, FORMAT: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Weighted values divided by their weight, to [num_tokens, num_heads, DIM]."""
    d = tl.arange(0, WIDTH)
    if FORMAT == E4M3:
        mixed *= E4M3_FACTOR
    at = (token * (what.num_kv_heads * GROUP) + head) * DIM
    result = (mixed / weight[:, None]).to(what.out.dtype.element_ty)
    tl.store(what.out + at[:, None] + d[None, :], result, is_there[:, None] & (d < DIM)[None, :])
