"""`pack` and `unpack`: KV blocks between the pool and one contiguous payload, converted to the receiver's dtype.

Both also return the data part of each block's digest, which kv.proto defines: a sum of 64-bit words times odd multipliers,
modulo 2^64. It is the same number from any backend because a sum may be taken in any order. The torch bodies here are the
reference and the fallback everywhere; native/ does the same in one pass over the bytes, gpu/ on a GPU.

Conversion goes through fp32 and rounds to nearest, ties to even; keys are transformed on their way into a quantised dtype and back
on their way out of one (quantise.py). A NaN that is converted becomes the positive quiet NaN of its new dtype; between equal
dtypes bytes stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitfire.core.layout import KvLayout
from splitfire.engine.kernels import native
from splitfire.engine.kernels.quantise import dequantise, hadamard, quantise
from splitfire.engine.pool import TORCH_DTYPES, KvPool, elements_of, scales_of

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MASK = (1 << 64) - 1


class GpuBody(Protocol):
    """gpu/pack.py: sums stay on the device, [len(block_ids)] int64."""

    def pack(
        self, pool: KvPool, block_ids: Sequence[int], num_tokens: int, dtype: str, payload: Tensor, *, digest: bool
    ) -> Tensor: ...

    def unpack(self, pool: KvPool, block_ids: Sequence[int], payload: Tensor, *, digest: bool) -> Tensor: ...


def pack(
    pool: KvPool,
    block_ids: Sequence[int],
    num_tokens: int,  # valid ones in these blocks; those past them are sent as zeros (K14)
    dtype: str,  # of the receiver's pool
    payload: Tensor,  # [len(block_ids) * wire block bytes] uint8; written completely
    *,
    digest: bool = True,
) -> list[int]:  # an unsigned 64-bit sum a block; none without `digest`
    """Gathers blocks over all layers into `payload`, converting. On a GPU it waits for what is read from there: the sums, and a
    payload in host memory; without both it returns at once, and the payload is complete when the current stream is."""
    gpu = _gpu(pool, block_ids, payload, replace(pool.layout, dtype=dtype))
    if gpu is not None:
        on_device = payload if payload.device == pool.raw.device else torch.empty_like(payload, device=pool.raw.device)
        device_sums = gpu.pack(pool, block_ids, num_tokens, dtype, on_device, digest=digest)
        if on_device is not payload:
            payload.copy_(on_device)
        return _read(device_sums) if digest else []
    mover = _mover(pool.layout, dtype)
    if mover is None or not _is_native(pool, block_ids, payload, mover):
        return pack_reference(pool, block_ids, num_tokens, dtype, payload, digest=digest)
    sums = mover.pack(pool.raw, block_ids, num_tokens, payload, digest)
    return sums if digest else []


def unpack(pool: KvPool, block_ids: Sequence[int], payload: Tensor, *, digest: bool = True) -> list[int]:
    """Copies a payload in the pool's own dtype into its blocks; the sums are those of the payload, for comparing. Nobody must
    see the blocks before that is done. On a GPU it waits for the sums, and without them for nothing."""
    gpu = _gpu(pool, block_ids, payload, pool.layout)
    if gpu is not None:
        device_sums = gpu.unpack(pool, block_ids, payload.to(pool.raw.device), digest=digest)
        return _read(device_sums) if digest else []
    mover = _mover(pool.layout, pool.layout.dtype)
    if mover is None or not _is_native(pool, block_ids, payload, mover):
        return unpack_reference(pool, block_ids, payload, digest=digest)
    sums = mover.unpack(pool.raw, block_ids, payload, digest)
    return sums if digest else []


def pack_reference(
    pool: KvPool, block_ids: Sequence[int], num_tokens: int, dtype: str, payload: Tensor, *, digest: bool = True
) -> list[int]:
    """`pack` in torch."""
    layout = replace(pool.layout, dtype=dtype)
    wire = payload.view(len(block_ids), layout.block_bytes)
    ids = torch.tensor(block_ids, device=pool.device)
    if dtype == pool.layout.dtype and wire.device == pool.device:
        torch.index_select(pool.raw, 0, ids, out=wire)
    elif dtype == pool.layout.dtype:
        wire.copy_(pool.raw[ids])
    else:
        _convert(pool, ids, layout, wire)
    wire[:, layout.content_bytes :] = 0
    for block in range(num_tokens // layout.block_size, len(block_ids)):
        valid = max(0, num_tokens - block * layout.block_size)
        elements_of(wire, layout)[block, ..., valid:, :] = 0
        if layout.is_quantised:
            scales_of(wire, layout)[block, ..., valid:] = 0
    return block_sums(payload, len(block_ids)) if digest else []


def unpack_reference(pool: KvPool, block_ids: Sequence[int], payload: Tensor, *, digest: bool = True) -> list[int]:
    """`unpack` in torch."""
    pool.raw[torch.tensor(block_ids, device=pool.device)] = payload.view(len(block_ids), -1).to(pool.device)
    return block_sums(payload, len(block_ids)) if digest else []


def block_sums(payload: Tensor, num_blocks: int) -> list[int]:
    """payload [num_blocks * block bytes] uint8 -> one unsigned 64-bit sum a block. Block bytes are a multiple of 8."""
    words = payload.view(torch.int64).view(num_blocks, -1)
    factors = multipliers(words.shape[1])
    if payload.device.type == "cpu":  # one pass over the data, twice as fast as torch's two
        sums = np.einsum("ij,j->i", words.numpy(), factors.numpy()).tolist()
    else:
        sums = (words * factors.to(payload.device)).sum(1).tolist()
    return [s & _MASK for s in sums]


@lru_cache(maxsize=8)
def multipliers(count: int) -> Tensor:
    """m[i] = mix(i + 1) | 1 of kv.proto, as int64."""
    with np.errstate(over="ignore"):
        x: npt.NDArray[np.uint64] = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x | np.uint64(1)).view(np.int64))


@lru_cache(maxsize=16)
def _mover(layout: KvLayout, dtype: str) -> native.BlockMover | None:
    """None: without native code."""
    wire = replace(layout, dtype=dtype)
    return native.BlockMover(layout, wire, multipliers(wire.block_bytes // 8)) if native.BlockMover.supports(layout) else None


def _is_native(pool: KvPool, block_ids: Sequence[int], payload: Tensor, mover: native.BlockMover) -> bool:
    """Whether native code may have these."""
    return pool.device.type == payload.device.type == "cpu" and _is_sound(pool, block_ids, payload, mover.wire_block_bytes)


def _gpu(pool: KvPool, block_ids: Sequence[int], payload: Tensor, wire: KvLayout) -> GpuBody | None:
    """The body for a pool on a GPU; None for others, without triton, and for what torch's has to refuse."""
    if pool.device.type != "cuda" or payload.device.type not in ("cpu", pool.device.type):
        return None
    return _load_gpu() if _is_sound(pool, block_ids, payload, wire.block_bytes) else None


@lru_cache(maxsize=1)
def _load_gpu() -> GpuBody | None:
    """Not imported above: it imports triton, which not everybody has."""
    if importlib.util.find_spec("triton") is None:
        return None
    body: GpuBody = importlib.import_module("splitfire.engine.kernels.gpu.pack")
    return body


def _is_sound(pool: KvPool, block_ids: Sequence[int], payload: Tensor, wire_block_bytes: int) -> bool:
    """What torch's body finds wrong by itself would elsewhere be written beyond its end."""
    if payload.data_ptr() % 8:
        return False
    if block_ids and not 0 <= min(block_ids) <= max(block_ids) < pool.num_blocks:
        raise IndexError(f"blocks {min(block_ids)} to {max(block_ids)}, the pool has {pool.num_blocks}")
    return payload.is_contiguous() and payload.dtype == torch.uint8 and len(payload) == len(block_ids) * wire_block_bytes


def _read(sums: Tensor) -> list[int]:
    """Waits for the device."""
    return [s & _MASK for s in sums.tolist()]


def _convert(pool: KvPool, ids: Tensor, layout: KvLayout, wire: Tensor) -> None:
    """Writes elements and scales of `wire`, whose dtype is not the pool's."""
    elements = pool.elements[ids]
    wide = elements.float() if pool.scales is None else dequantise(elements, pool.scales[ids])
    if layout.is_quantised != pool.layout.is_quantised:
        wide[:, :, 0] = hadamard(wide[:, :, 0])
    target = TORCH_DTYPES[layout.dtype]
    if layout.is_quantised:
        quantised, scales = quantise(wide, target)
        elements_of(wire, layout).copy_(quantised)
        scales_of(wire, layout).copy_(scales)
    else:
        # Which NaN a cast makes depends on the vector width: bf16's on a CPU is 0xFFFF here and 0x7FC0 there.
        elements_of(wire, layout).copy_(wide.to(target).masked_fill_(wide.isnan(), torch.nan))
