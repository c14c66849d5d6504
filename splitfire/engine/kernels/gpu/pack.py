"""`pack` and `unpack`: ../pack.py's ops in one pass over the bytes, digest included. A program for each piece of a block.

The bytes and the sums are those of the torch bodies, to the bit: numbers are widened and rounded as ../quantise.py does, bf16 by integer
arithmetic, as the interpreter does not round it. A digest is a sum of words in any order, so programs add theirs up in memory.

Nothing here waits for the device: sums stay there, and who reads them waits for the bytes too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.core.layout import DTYPE_BYTES, KvLayout
from splitfire.engine.kernels.gpu.quantise import e4m3_as_half, hadamard, quantise
from splitfire.engine.kernels.gpu.splitmix import mix
from splitfire.engine.pool import KvPool

WORDS = 1024  # of 8 bytes, that a program copies: 4 times 16 bytes a thread
ELEMENTS = 2048  # that a program converts: 16 a thread; of 32 some spill on sm_80 (ptxas, 2026-11)
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SOURCES = {"bf16": torch.int16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8, "fp8_e4m3": torch.uint8}


def pack(
    pool: KvPool,
    block_ids: Sequence[int],  # all in the pool
    num_tokens: int,  # valid ones in these blocks
    dtype: str,  # of the payload
    payload: Tensor,  # [len(block_ids) * wire block bytes] uint8 on the pool's device, aligned to 8 bytes; written completely
    *,
    digest: bool = True,
) -> Tensor:  # [len(block_ids)] int64 on the device: the sums; zeros without `digest`
    """As ../pack.py's."""
    wire = replace(pool.layout, dtype=dtype)
    if dtype == pool.layout.dtype:
        return _move(pool, block_ids, payload, num_tokens, is_pack=True, digest=digest)
    if wire.content_bytes < wire.block_bytes:
        payload.view(len(block_ids), wire.block_bytes)[:, wire.content_bytes :] = 0
    return _convert_blocks(pool, block_ids, num_tokens, wire, payload, digest=digest)


def unpack(pool: KvPool, block_ids: Sequence[int], payload: Tensor, *, digest: bool = True) -> Tensor:
    """As ../pack.py's; payload and sums as `pack`'s."""
    return _move(pool, block_ids, payload, len(block_ids) * pool.layout.block_size, is_pack=False, digest=digest)


def _on_device(pool: KvPool, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The ids, and sums of nothing so far. From pinned memory, or the copy would wait for all that the stream has to do."""
    ids = torch.tensor(block_ids, dtype=torch.int64, pin_memory=pool.raw.is_cuda)
    return ids.to(pool.raw.device, non_blocking=True), torch.zeros(len(block_ids), dtype=torch.int64, device=pool.raw.device)


def _move(pool: KvPool, block_ids: Sequence[int], payload: Tensor, num_tokens: int, *, is_pack: bool, digest: bool) -> Tensor:
    """Bytes as they are; but what is packed is zero past the valid tokens and in the padding."""
    layout, (ids, sums) = pool.layout, _on_device(pool, block_ids)
    vector_bytes = layout.head_dim * DTYPE_BYTES[layout.dtype]
    if block_ids:
        _copy[len(block_ids), triton.cdiv(layout.block_bytes, 8 * WORDS)](
            pool.raw.view(torch.int64), payload.view(torch.int64), ids, sums, num_tokens, layout.block_bytes // 8, layout.block_size,
            vector_bytes, layout.scale_offset, layout.content_bytes, math.gcd(8, vector_bytes, 2 if layout.is_quantised else 8),
            is_pack, digest, WORDS,
        )  # fmt: skip
    return sums


def _convert_blocks(
    pool: KvPool, block_ids: Sequence[int], num_tokens: int, wire: KvLayout, payload: Tensor, *, digest: bool
) -> Tensor:
    layout, (ids, sums) = pool.layout, _on_device(pool, block_ids)
    dim, width, side = layout.head_dim, triton.next_power_of_2(layout.head_dim), layout.num_kv_heads * layout.block_size
    vectors = max(1, min(ELEMENTS // width, triton.next_power_of_2(side)))
    element_bytes = DTYPE_BYTES[wire.dtype]
    part = math.gcd(dim, 8 // element_bytes)
    if block_ids:
        _convert[len(block_ids), 2 * layout.num_layers * triton.cdiv(side, vectors)](
            pool.raw.view(_SOURCES[layout.dtype]), pool.raw.view(torch.float16), payload.view(_WHOLE[part * element_bytes]),
            payload.view(torch.int16), ids, sums, num_tokens, layout.block_bytes, wire.block_bytes, layout.scale_offset,
            wire.scale_offset, layout.dtype, wire.dtype, DTYPE_BYTES[layout.dtype], element_bytes, part, layout.num_kv_heads,
            layout.block_size, dim, width, vectors, digest,
        )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["num_tokens"])
def _copy(
    pool,  # [num_blocks, NUM_WORDS]
    payload,  # [len(ids), NUM_WORDS]
    ids,  # [len(ids)]
    sums,  # [len(ids)], added to
    num_tokens,
    NUM_WORDS: tl.constexpr,  # of a block
    BLOCK_SIZE: tl.constexpr,
    VECTOR_BYTES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    CONTENT_BYTES: tl.constexpr,
    PART: tl.constexpr,  # bytes that are of one token, all of them
    IS_PACK: tl.constexpr,
    HAS_DIGEST: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program (i, piece) has words of block i."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    is_there = at < NUM_WORDS
    here, there = pool + tl.load(ids + i) * NUM_WORDS + at, payload + i * NUM_WORDS + at
    if IS_PACK:
        word = tl.load(here, is_there, 0)
        valid = num_tokens - i * BLOCK_SIZE
        if (valid < BLOCK_SIZE) | (CONTENT_BYTES < NUM_WORDS * 8):
            keep = tl.zeros([WORDS], tl.int64)
            for part in tl.static_range(0, 8, PART):
                byte = at * 8 + part
                vector = tl.where(byte < SCALE_OFFSET, byte // VECTOR_BYTES, (byte - SCALE_OFFSET) // 2)
                is_kept = (vector % BLOCK_SIZE < valid) & (byte < CONTENT_BYTES)
                keep |= tl.where(is_kept, ((1 << 8 * PART) - 1 if PART < 8 else -1) << 8 * part, 0).to(tl.int64)
            word &= keep
        tl.store(there, word, is_there)
    else:
        word = tl.load(there, is_there, 0)
        tl.store(here, word, is_there)
    if HAS_DIGEST:
        tl.atomic_add(sums + i, tl.sum(word * multiplier(at), 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def _convert(
    pool,  # [num_blocks, POOL_BYTES], as elements
    pool_scales,  # the same, as scales
    payload,  # [len(ids), WIRE_BYTES], as parts
    payload_scales,  # the same, as the bits of scales
    ids,  # [len(ids)]
    sums,  # [len(ids)], added to
    num_tokens,
    POOL_BYTES: tl.constexpr,  # of a block
    WIRE_BYTES: tl.constexpr,
    POOL_SCALES: tl.constexpr,  # where they begin in a block
    WIRE_SCALES: tl.constexpr,
    SOURCE: tl.constexpr,  # dtypes, by their names
    TARGET: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,  # of an element
    TARGET_BYTES: tl.constexpr,
    PART: tl.constexpr,  # elements that are stored as one number, and lie in one word
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,  # at a time
    HAS_DIGEST: tl.constexpr,
):
    """Program (i, piece) has vectors of block i that are all keys or all values of one layer."""
    PIECES: tl.constexpr = (HEADS * BLOCK_SIZE + VECTORS - 1) // VECTORS
    PART_BYTES: tl.constexpr = PART * TARGET_BYTES
    i, side = tl.program_id(0).to(tl.int64), tl.program_id(1) // PIECES
    of_side = tl.program_id(1) % PIECES * VECTORS + tl.arange(0, VECTORS)
    is_there = of_side < HEADS * BLOCK_SIZE
    is_valid = is_there & (of_side % BLOCK_SIZE < num_tokens - i * BLOCK_SIZE)
    vector, d = side * (HEADS * BLOCK_SIZE) + of_side, tl.arange(0, WIDTH)
    block = tl.load(ids + i)
    source = pool + block * (POOL_BYTES // SOURCE_BYTES) + vector[:, None] * DIM + d[None, :]
    wide = widen(tl.load(source, is_valid[:, None] & (d < DIM)[None, :], 0), SOURCE)
    WAS_QUANTISED: tl.constexpr = SOURCE == "int8" or SOURCE == "fp8_e4m3"
    IS_QUANTISED: tl.constexpr = TARGET == "int8" or TARGET == "fp8_e4m3"
    if WAS_QUANTISED:
        scale = tl.load(pool_scales + block * (POOL_BYTES // 2) + POOL_SCALES // 2 + vector, is_valid, 0.0)
        wide *= scale.to(tl.float32)[:, None]
    if WAS_QUANTISED != IS_QUANTISED:
        if side % 2 == 0:
            wide = hadamard(wide, VECTORS, WIDTH, DIM & -DIM)
    total = tl.zeros([VECTORS], tl.int64)
    if IS_QUANTISED:
        bits, scale_bits = quantise(wide, TARGET == "int8")
        tl.store(payload_scales + i * (WIRE_BYTES // 2) + WIRE_SCALES // 2 + vector, scale_bits, is_there)
        scale_at = WIRE_SCALES + vector * 2
        total += (scale_bits.to(tl.int64) << (scale_at % 8 * 8).to(tl.int64)) * multiplier(scale_at // 8)
    else:
        bits = narrow(wide, TARGET)
    parts = tl.reshape(bits.to(tl.int64), [VECTORS, WIDTH // PART, PART])
    parts = tl.sum(parts << (tl.arange(0, PART) * (8 * TARGET_BYTES)).to(tl.int64)[None, None, :], 2)
    p = tl.arange(0, WIDTH // PART)
    place = vector[:, None] * (DIM // PART) + p[None, :]
    is_part = is_there[:, None] & (p < DIM // PART)[None, :]
    tl.store(payload + i * (WIRE_BYTES // PART_BYTES) + place, parts.to(payload.dtype.element_ty), is_part)
    if HAS_DIGEST:
        at = place * PART_BYTES
        parts = tl.where(is_part, parts, 0)  # beside a vector stand zeros times its scale, which may be no number
        total += tl.sum((parts << (at % 8 * 8).to(tl.int64)) * multiplier(at // 8), 1)
        tl.atomic_add(sums + i, tl.sum(total, 0), sem="relaxed")


@triton.jit
def multiplier(word):
    """kv.proto's, of the word with this number in its block."""
    return (mix(tl.zeros_like(word).to(tl.uint64), word + 1) | 1).to(tl.int64)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """Elements as the pool has them, bf16 and e4m3 as their bits -> fp32."""
    if DTYPE == "bf16":
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if DTYPE == "fp8_e4m3":
        return tl.where((x & 0x7F) == 0x7F, float("nan"), e4m3_as_half(x).to(tl.float32) * 256.0)
    return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 -> the bits of bf16, fp16 or fp32, to the nearest, ties to even; the positive quiet NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    if DTYPE == "bf16":
        return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    if DTYPE == "fp16":
        return tl.where(x == x, x.to(tl.float16).to(tl.uint16, bitcast=True), 0x7E00).to(tl.uint32)
    return tl.where(x == x, bits, 0x7FC00000)
