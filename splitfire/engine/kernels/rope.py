"""`rope_norm_write`: optional q/k norm, rotary embedding, and the cache write, as one op.

Every chunk writes its KV here first and then attends from the pool only, so what a cache holds never depends on where
chunks end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.engine.kernels.norm import rms_norm
from splitfire.engine.kernels.quantise import hadamard, quantise
from splitfire.engine.pool import LayerCache


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin of each token of the step, [num_tokens, 1, head_dim / 2], fp32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class CacheTargets:
    """Where each token of the step is written."""

    blocks: Tensor  # [num_tokens] int64
    offsets: Tensor  # [num_tokens] int64, within the block


@dataclass(frozen=True, slots=True)
class QkNorm:
    """Qwen3's norm of each query and key head."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float


def rope_norm_write(
    q: Tensor,  # [num_tokens, num_heads, head_dim]
    k: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    rotation: Rotation,
    norm: QkNorm | None,
    cache: LayerCache,  # written; quantised in the same go if it is
    targets: CacheTargets,
) -> Tensor:  # [num_tokens, num_heads, head_dim]: what `attend` takes as queries with this cache
    """Norms q and k per head, rotates them (halves, not pairs), writes k and v, returns q. With a quantised cache q and k are
    transformed as well, for the cache holds `hadamard` of its keys."""
    if norm is not None:
        q = rms_norm(q, norm.q_weight, norm.eps)
        k = rms_norm(k, norm.k_weight, norm.eps)
    q, k = rotate(q, rotation), rotate(k, rotation)
    if cache.scales is not None:
        dtype, num_heads = q.dtype, q.shape[1]
        both = hadamard(torch.cat((q, k), 1))  # at once: for few tokens its many small ops cost what starting them costs
        q, k = both[:, :num_heads].to(dtype), both[:, num_heads:]
    _write(cache, 0, targets, k)
    _write(cache, 1, targets, v)
    return q


def _write(cache: LayerCache, side: int, targets: CacheTargets, x: Tensor) -> None:
    """x [num_tokens, num_kv_heads, head_dim] becomes the keys (side 0) or values (1) of its tokens."""
    place = (targets.blocks, side, slice(None), targets.offsets)
    if cache.scales is None:
        cache.elements[place] = x.to(cache.elements.dtype)
    else:
        cache.elements[place], cache.scales[place] = quantise(x, cache.elements.dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """RoFormer (Su et al. 2021) in the half-split order of Hugging Face checkpoints; dtype of x.

    cos and sin are rounded to x's dtype first, as the checkpoints' own code does.
    """
    cos, sin = rotation.cos.to(x.dtype), rotation.sin.to(x.dtype)
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
