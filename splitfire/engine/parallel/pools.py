"""The KV pools of all ranks as rank 0 has them: its own, and those of the others in memory that both have mapped.

A step is over when rank 0 has its logits, or its last sum: until then every rank writes its own pool, afterwards none does and rank 0
may copy, pack and unpack blocks of all of them.
"""

from __future__ import annotations

import json
import mmap
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence

import torch
from torch import Tensor

from splitfire.core.layout import KvLayout
from splitfire.engine.blocks import BlockCopy
from splitfire.engine.parallel.shards import shard_layout
from splitfire.engine.pool import KvPool


class ShardedPool(KvPool):
    """Rank 0's pool, which its model computes with, and beside it the other ranks': a block is in the same place of each, with their
    heads. `layout` is that of a shard, `whole` that of the worker's blocks as others know them."""

    def __init__(self, whole: KvLayout, own: KvPool, others: Sequence[KvPool]) -> None:
        assert all(pool.layout == shard_layout(whole, 1 + len(others)) for pool in (own, *others))
        super().__init__(own.layout, own.num_blocks, own.device, own.raw)
        self.whole = whole
        self.shards = (own, *others)  # in order of their heads

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for shard in self.shards:
            shard.copy(copies)
        self.settle()

    def settle(self) -> None:
        """Waits until what was written here is there for the other ranks, whose streams know nothing of this process's."""
        for shard in self.shards:
            if shard.device.type == "cuda":
                torch.cuda.synchronize(shard.device)


def new_memory(num_bytes: int) -> int:
    """A descriptor of memory without a name, zeros, all of it there: a process that inherits it maps it too. It goes with the last of
    them."""
    descriptor = os.memfd_create("splitfire-kv")
    os.posix_fallocate(descriptor, 0, num_bytes)
    return descriptor


def map_pool(descriptor: int, layout: KvLayout, num_blocks: int) -> KvPool:
    """A pool on the CPU in such memory."""
    num_bytes = num_blocks * layout.block_bytes
    memory = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    raw = torch.frombuffer(memory, dtype=torch.uint8).view(num_blocks, -1)
    return KvPool(layout, num_blocks, torch.device("cpu"), raw)


def cuda_handle(raw: Tensor) -> bytes:
    """What another process on this host opens the memory of a CUDA tensor with, while this one keeps the tensor."""
    fields = raw.untyped_storage()._share_cuda_()
    return json.dumps([{"bytes": b64encode(f).decode()} if isinstance(f, bytes) else f for f in fields]).encode()


def open_cuda_pool(handle: bytes | bytearray, layout: KvLayout, num_blocks: int) -> KvPool:
    """Of another process's `cuda_handle`: a pool on its device, in its memory."""
    torch.cuda.init()
    fields = (b64decode(field["bytes"]) if isinstance(field, dict) else field for field in json.loads(handle))
    storage = torch.UntypedStorage._new_shared_cuda(*fields)
    raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    raw = raw[: num_blocks * layout.block_bytes].view(num_blocks, -1)
    return KvPool(layout, num_blocks, raw.device, raw)
