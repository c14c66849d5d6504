"""`pack` and `unpack`: KV blocks between the pool and one contiguous payload, converted to the receiver's dtype.

Also `block_sums`, the data part of the per-block digest that kv.proto defines: a sum of 64-bit words times odd
multipliers, modulo 2^64. It is the same number from any backend because a sum may be taken in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitfire.engine.pool import TORCH_DTYPES, KvPool

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def pack(
    pool: KvPool,
    block_ids: Sequence[int],
    num_tokens: int,  # valid ones in these blocks; those past them are sent as zeros (K14)
    dtype: str,  # of the receiver's pool
    payload: Tensor,  # [len(block_ids) * wire block bytes] uint8; written completely
) -> None:
    """Gathers blocks over all layers into `payload`, converting."""
    wire = payload.view(TORCH_DTYPES[dtype]).view(len(block_ids), *pool.layout.block_shape)
    ids = torch.tensor(block_ids, device=pool.data.device)
    if wire.dtype == pool.data.dtype and pool.data.device == wire.device:
        torch.index_select(pool.data, 0, ids, out=wire)
    else:
        wire.copy_(pool.data[ids])
    first_partial = num_tokens // pool.layout.block_size
    for block in range(first_partial, len(block_ids)):
        wire[block, :, :, :, max(0, num_tokens - block * pool.layout.block_size) :] = 0


def unpack(pool: KvPool, block_ids: Sequence[int], dtype: str, payload: Tensor) -> None:
    """Scatters a verified payload in `dtype` into the pool's blocks, converting."""
    wire = payload.view(TORCH_DTYPES[dtype]).view(len(block_ids), *pool.layout.block_shape)
    pool.data[torch.tensor(block_ids, device=pool.data.device)] = wire.to(pool.data.device, pool.data.dtype)


def block_sums(payload: Tensor, num_blocks: int) -> list[int]:
    """payload [num_blocks * block bytes] uint8 -> one unsigned 64-bit sum a block. Block bytes are a multiple of 8."""
    words = payload.view(torch.int64).view(num_blocks, -1)
    multipliers = _multipliers(words.shape[1])
    if payload.device.type == "cpu":  # one pass over the data, twice as fast as torch's two
        sums = np.einsum("ij,j->i", words.numpy(), multipliers.numpy()).tolist()
    else:
        sums = (words * multipliers.to(payload.device)).sum(1).tolist()
    return [s & (1 << 64) - 1 for s in sums]


@lru_cache(maxsize=8)
def _multipliers(count: int) -> Tensor:
    """m[i] = mix(i + 1) | 1 of kv.proto, as int64."""
    with np.errstate(over="ignore"):
        x: npt.NDArray[np.uint64] = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x | np.uint64(1)).view(np.int64))
