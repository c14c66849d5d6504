"""What kernels that read or write the pool are told, gathered from what their callers have: named tuples, which Triton takes apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu.spans import NO_WINDOW, Places
from splitfire.engine.pool import LayerCache

LOG2_E = 1.4426950408889634
PLAIN: tl.constexpr = tl.constexpr(0)  # formats of a pool's elements
INT8: tl.constexpr = tl.constexpr(1)
E4M3: tl.constexpr = tl.constexpr(2)
E4M3_FACTOR: tl.constexpr = tl.constexpr(256.0)  # what widen() leaves out of e4m3


def format_of(cache: LayerCache) -> int:
    kind = PLAIN if cache.scales is None else INT8 if cache.elements.dtype == torch.int8 else E4M3
    return int(kind.value)


class Cache(NamedTuple):
    """A layer of the pool as kernels take it."""

    elements: Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim], e4m3 as bytes
    scales: Tensor | None  # [num_blocks, 2, num_kv_heads, block_size] fp16
    block_stride: int
    side_stride: int
    scale_block_stride: int
    scale_side_stride: int

    @staticmethod
    def of(cache: LayerCache) -> Cache:
        elements, scales = cache.elements, cache.scales
        raw = elements.view(torch.uint8) if format_of(cache) == E4M3.value else elements
        scale_strides = (0, 0) if scales is None else scales.stride()[:2]
        return Cache(raw, scales, elements.stride(0), elements.stride(1), *scale_strides)


class Attention(NamedTuple):
    """What kernels of attention are told."""

    q: Tensor  # [num_tokens, num_heads, head_dim], tokens `q_stride` apart
    q_stride: int
    out: Tensor  # [num_tokens, num_heads, head_dim]
    cache: Cache
    places: Places
    num_kv_heads: int
    factor: float  # of scores, times log2(e)
    window: int


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """Arguments of a kernel of attention, and what it knows when it is compiled."""

    what: Attention
    constants: dict[str, int]

    @staticmethod
    def of(q: Tensor, cache: LayerCache, places: Places, scale: float, window: int | None, out: Tensor) -> AttentionLaunch:
        num_kv_heads, block_size, head_dim = cache.elements.shape[2:]
        pool_format = format_of(cache)
        factor = scale * LOG2_E * (E4M3_FACTOR.value if pool_format == E4M3.value else 1.0)
        constants = dict(
            FORMAT=pool_format, GROUP=q.shape[1] // num_kv_heads, BLOCK_SIZE=block_size, DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim), HAS_WINDOW=window is not None,
        )  # fmt: skip
        what = Attention(q, q.stride(0), out, Cache.of(cache), places, num_kv_heads, factor, window or NO_WINDOW)
        return AttentionLaunch(what, constants)
