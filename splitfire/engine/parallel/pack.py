"""`pack` and `unpack` of kernels/pack.py for any pool: blocks of several ranks travel whole, each rank's heads in their range.

So a worker's number of ranks is nobody else's business: whatever it is on either side, a block is the same bytes between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from splitfire.core.layout import KvLayout
from splitfire.engine.kernels import pack as one_rank
from splitfire.engine.parallel.pools import ShardedPool
from splitfire.engine.pool import KvPool


def pack(pool: KvPool, block_ids: Sequence[int], num_tokens: int, dtype: str, payload: Tensor, *, digest: bool = True) -> list[int]:
    if not isinstance(pool, ShardedPool):
        return one_rank.pack(pool, block_ids, num_tokens, dtype, payload, digest=digest)
    whole = replace(pool.whole, dtype=dtype)
    wire = payload.view(len(block_ids), whole.block_bytes)
    wire[:, whole.content_bytes :] = 0
    for shard, heads in _places(pool):
        layout = replace(shard.layout, dtype=dtype)
        part = torch.empty(len(block_ids) * layout.block_bytes, dtype=torch.uint8, device=payload.device)
        with torch.cuda.device_of(shard.raw):
            one_rank.pack(shard, block_ids, num_tokens, dtype, part, digest=False)
        for target, source in zip(_by_head(wire, whole), _by_head(part.view(len(block_ids), -1), layout), strict=True):
            target[:, :, heads] = source
    return one_rank.block_sums(payload, len(block_ids)) if digest else []


def unpack(pool: KvPool, block_ids: Sequence[int], payload: Tensor, *, digest: bool = True) -> list[int]:
    if not isinstance(pool, ShardedPool):
        return one_rank.unpack(pool, block_ids, payload, digest=digest)
    wire = payload.view(len(block_ids), pool.whole.block_bytes)
    for shard, heads in _places(pool):
        part = torch.zeros(len(block_ids), shard.layout.block_bytes, dtype=torch.uint8, device=payload.device)
        for target, source in zip(_by_head(part, shard.layout), _by_head(wire, pool.whole), strict=True):
            target[:] = source[:, :, heads]
        with torch.cuda.device_of(shard.raw):
            one_rank.unpack(shard, block_ids, part.view(-1), digest=False)
    pool.settle()
    return one_rank.block_sums(payload, len(block_ids)) if digest else []


def _places(pool: ShardedPool) -> Iterator[tuple[KvPool, slice]]:
    """Each shard and the range of its heads."""
    for rank, shard in enumerate(pool.shards):
        num_heads = shard.layout.num_kv_heads
        yield shard, slice(rank * num_heads, (rank + 1) * num_heads)


def _by_head(raw: Tensor, layout: KvLayout) -> list[Tensor]:
    """raw [num_blocks, block_bytes] uint8 -> views [num_blocks, num_layers * 2, num_kv_heads, bytes], of the elements and, in a quantised
    layout, of the scales."""
    num_rows = layout.num_layers * 2
    pieces = [raw[:, : layout.scale_offset]]
    if layout.is_quantised:
        pieces.append(raw[:, layout.scale_offset : layout.content_bytes])
    return [p.view(len(p), num_rows, layout.num_kv_heads, p.shape[1] // (num_rows * layout.num_kv_heads)) for p in pieces]
