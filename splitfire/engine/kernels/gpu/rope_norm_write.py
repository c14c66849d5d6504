"""`rope_norm_write`: ../rope.py's op in one pass: norm of queries and keys, rotation, the Hadamard transform and quantisation where the
pool is quantised, and the cache write. A program for each token's queries, keys and values.

What the pool gets is what ../quantise.py would have written for the same numbers, to the bit: scales are rounded to fp16, elements half
to even, and fp8 by integer arithmetic, which the interpreter and every processor do alike.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu.arguments import INT8, PLAIN, Cache, format_of
from splitfire.engine.kernels.gpu.quantise import hadamard, quantise
from splitfire.engine.kernels.rope import CacheTargets, QkNorm, Rotation
from splitfire.engine.pool import LayerCache

HEADS = 8  # that a program has in its registers: 8 x 128 numbers


def rope_norm_write(
    qkv: Tensor,  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim], contiguous; its queries are overwritten
    rotation: Rotation,
    norm: QkNorm | None,
    cache: LayerCache,  # written
    targets: CacheTargets,  # a token whose block is negative is written nowhere
) -> Tensor:  # [num_tokens, num_heads, head_dim]: what attention takes as queries with this cache; a view of qkv
    """As ../rope.py's."""
    num_tokens, num_vectors, head_dim = qkv.shape
    num_kv_heads, block_size = cache.elements.shape[2:4]
    num_heads = num_vectors - 2 * num_kv_heads
    if num_tokens:
        weights = (qkv, qkv) if norm is None else (norm.q_weight, norm.k_weight)
        _rope_norm_write[num_tokens, 3](
            qkv, rotation.cos, rotation.sin, *weights, Cache.of(cache), targets.blocks, targets.offsets, num_heads, num_kv_heads,
            0.0 if norm is None else norm.eps, norm is not None, format_of(cache), block_size, head_dim,
            triton.next_power_of_2(head_dim), HEADS, num_warps=4,
        )  # fmt: skip
    return qkv[:, :num_heads]


@triton.jit
def _rope_norm_write(
    qkv,  # [num_tokens, num_heads + 2 * num_kv_heads, DIM]
    cos,  # [num_tokens, DIM / 2] fp32
    sin,
    q_weight,  # [DIM]
    k_weight,
    cache,  # flash.Cache
    blocks,  # [num_tokens]
    offsets,  # [num_tokens]
    num_heads,
    num_kv_heads,
    eps,
    HAS_NORM: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,  # at a time
):
    """Program (token, 0) has the queries, 1 the keys, 2 the values."""
    RUN: tl.constexpr = DIM & -DIM
    i = tl.arange(0, WIDTH)
    token, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.where(kind == 0, 0, num_heads + (kind - 1) * num_kv_heads)
    count = tl.where(kind == 0, num_heads, num_kv_heads)
    other = tl.where(i < DIM // 2, i + DIM // 2, i - DIM // 2)
    angle = token * (DIM // 2) + i % (DIM // 2)
    for begin in range(0, count, HEADS):
        head = begin + tl.arange(0, HEADS)
        is_there = (head < count)[:, None] & (i < DIM)[None, :]
        row = qkv + (token * (num_heads + 2 * num_kv_heads) + first + head[:, None]) * DIM
        x = tl.load(row + i[None, :], is_there, 0.0)
        dtype: tl.constexpr = x.dtype
        if kind < 2:
            partner = tl.load(row + other[None, :], is_there, 0.0)
            if HAS_NORM:
                weight = q_weight
                if kind == 1:
                    weight = k_weight
                wide = x.to(tl.float32)
                factor = tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
                x = ((wide * factor).to(dtype) * tl.load(weight + i, i < DIM, 0.0)[None, :]).to(dtype)
                partner = ((partner.to(tl.float32) * factor).to(dtype) * tl.load(weight + other, i < DIM, 0.0)[None, :]).to(dtype)
            across = partner.to(tl.float32) * tl.load(sin + angle, i < DIM, 0.0).to(dtype).to(tl.float32)[None, :]
            along = x.to(tl.float32) * tl.load(cos + angle, i < DIM, 0.0).to(dtype).to(tl.float32)[None, :]
            x = tl.where((i < DIM // 2)[None, :], along - across, along + across).to(dtype)
        wide = x.to(tl.float32)
        if FORMAT != PLAIN:
            if kind < 2:
                wide = hadamard(wide, HEADS, WIDTH, RUN)
        if kind == 0:
            tl.store(row + i[None, :], wide.to(dtype), is_there)
        else:
            block = tl.load(blocks + token)
            offset = tl.load(offsets + token)
            if block >= 0:
                vector = head * BLOCK_SIZE + offset
                to = (
                    cache.elements
                    + block * cache.block_stride
                    + (kind - 1) * cache.side_stride
                    + vector[:, None] * DIM
                    + i[None, :]
                )
                if FORMAT == PLAIN:
                    tl.store(to, wide.to(cache.elements.dtype.element_ty), is_there)
                else:
                    elements, scale_bits = quantise(wide, FORMAT == INT8)
                    tl.store(to, elements.to(cache.elements.dtype.element_ty, bitcast=True), is_there)
                    scale_to = cache.scales + block * cache.scale_block_stride + (kind - 1) * cache.scale_side_stride + vector
                    tl.store(scale_to, scale_bits.to(tl.float16, bitcast=True), head < count)
