"""The ops of the path, by name: what a worker uses here (compiled where it could be built), and plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from splitfire.engine.kernels import pack as kernels
from splitfire.engine.pool import KvPool

OPS = ("compiled", "torch")


def pack(ops: str, pool: KvPool, ids: Sequence[int], dtype: str, payload: Tensor, *, digest: bool) -> list[int]:
    call = kernels.pack if ops == "compiled" else kernels.pack_reference
    return call(pool, ids, len(ids) * pool.layout.block_size, dtype, payload, digest=digest)


def unpack(ops: str, pool: KvPool, ids: Sequence[int], payload: Tensor, *, digest: bool) -> list[int]:
    call = kernels.unpack if ops == "compiled" else kernels.unpack_reference
    return call(pool, ids, payload, digest=digest)
