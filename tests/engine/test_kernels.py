"""Each op against plain torch in fp32, on awkward sizes, outputs and unused memory poisoned."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from splitfire.core.layout import KvLayout
from splitfire.engine.kernels.attention import QUERY_TILE, QuerySpan, attend, plan_attention
from splitfire.engine.kernels.norm import rms_norm, silu_mul
from splitfire.engine.kernels.pack import block_sums, pack, unpack
from splitfire.engine.pool import TORCH_DTYPES, KvPool

BLOCK, KV_HEADS, GROUP, DIM = 16, 2, 3, 32
CPU = torch.device("cpu")


class Case(NamedTuple):
    """Queries, a pool, and where each sequence is in both."""

    q: torch.Tensor
    cache: torch.Tensor
    spans: list[QuerySpan]
    contents: list[torch.Tensor]  # each sequence's own K and V


def attention_case(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Case:
    """Sequences of (new tokens, context) in scattered blocks; every other position of the pool is NaN: block 0, which pads
    block tables, and the unwritten end of each last block. One that leaked into a result would show."""
    generator = torch.Generator().manual_seed(1)
    num_blocks = sum(-(-context // BLOCK) for _, context in shapes) + 7
    cache = torch.full((num_blocks, 2, KV_HEADS, BLOCK, DIM), float("nan"), dtype=dtype)
    free = list(range(1, num_blocks))
    random.Random(1).shuffle(free)
    spans, contents, begin = [], [], 0
    for new, context in shapes:
        ids = tuple(free.pop() for _ in range(-(-context // BLOCK)))
        kv = torch.randn(2, KV_HEADS, context, DIM, generator=generator).to(dtype)
        padded = torch.full((2, KV_HEADS, len(ids) * BLOCK, DIM), float("nan"), dtype=dtype)
        padded[:, :, :context] = kv
        for i, block in enumerate(ids):
            cache[block] = padded[:, :, i * BLOCK : (i + 1) * BLOCK]
        spans.append(QuerySpan(begin, begin + new, context, ids))
        contents.append(kv)
        begin += new
    return Case(torch.randn(begin, KV_HEADS * GROUP, DIM, generator=generator).to(dtype), cache, spans, contents)


def reference(q: torch.Tensor, kv: torch.Tensor, window: int | None) -> torch.Tensor:
    """q [new, heads, dim], kv [2, kv_heads, context, dim]; plain fp32 with an explicit mask."""
    new, context = q.shape[0], kv.shape[2]
    keys, values = kv.float().repeat_interleave(GROUP, 1)
    rows = torch.arange(context - new, context)[:, None]
    columns = torch.arange(context)
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    out = scaled_dot_product_attention(q.float().transpose(0, 1)[None], keys[None], values[None], attn_mask=seen, scale=DIM**-0.5)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40, 1000])
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1)],
        [(1, 17), (1, 16), (1, 300), (1, 1)],
        [(5, 5)],
        [(17, 40), (1, 9), (QUERY_TILE + 1, QUERY_TILE + 30), (1, 250)],
        [(2, 2), (QUERY_TILE, QUERY_TILE)],
        [(300, 300)],
    ],
)
def test_attend_equals_plain_attention(shapes: list[tuple[int, int]], window: int | None) -> None:
    q, cache, spans, contents = attention_case(shapes)
    out = attend(q, cache, plan_attention(spans, CPU), DIM**-0.5, window)
    assert not out.isnan().any()
    for span, kv in zip(spans, contents, strict=True):
        expected = reference(q[span.begin : span.end], kv, window)
        torch.testing.assert_close(out[span.begin : span.end], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_attention_is_as_good_as_plain_torchs(dtype: torch.dtype) -> None:
    q, cache, spans, contents = attention_case([(40, 100), (1, 77)], dtype)
    out = attend(q, cache, plan_attention(spans, CPU), DIM**-0.5)
    for span, kv in zip(spans, contents, strict=True):
        mine = q[span.begin : span.end]
        exact = reference(mine, kv, None)
        keys, values = kv.repeat_interleave(GROUP, 1)
        rows = torch.arange(kv.shape[2] - mine.shape[0], kv.shape[2])[:, None]
        plain = scaled_dot_product_attention(
            mine.transpose(0, 1)[None], keys[None], values[None], attn_mask=torch.arange(kv.shape[2]) <= rows, scale=DIM**-0.5
        )[0].transpose(0, 1)
        ours, theirs = (out[span.begin : span.end].float() - exact).abs().max(), (plain.float() - exact).abs().max()
        assert ours <= 2 * theirs + 1e-6


def test_padding_a_decode_batch_is_bounded() -> None:
    """One long sequence beside many short ones is not padded to its length."""
    spans = [QuerySpan(i, i + 1, 10, (1,)) for i in range(30)] + [QuerySpan(30, 31, 1600, tuple(range(100)))]
    plan = plan_attention(spans, CPU)
    assert sorted(len(batch.rows) for batch in plan.decodes) == [3, 28] or len(plan.decodes) > 1
    assert sum(batch.block_tables.numel() for batch in plan.decodes) <= 4.0 * 130


def test_rms_norm_and_silu_mul_follow_their_formulas() -> None:
    x, weight = torch.randn(3, 5, 8), torch.randn(8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))
    gate_up = torch.randn(4, 10)
    torch.testing.assert_close(silu_mul(gate_up), gate_up[:, :5] * torch.sigmoid(gate_up[:, :5]) * gate_up[:, 5:])


# -- pack and unpack


def random_pool(dtype: str, num_blocks: int = 9, seed: int = 0) -> KvPool:
    pool = KvPool(KvLayout(dtype, 3, KV_HEADS, DIM, BLOCK), num_blocks, CPU)
    pool.data.copy_(torch.randn(pool.data.shape, generator=torch.Generator().manual_seed(seed)))
    return pool


def poisoned(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


@pytest.mark.parametrize("source", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("target", sorted(TORCH_DTYPES))
@pytest.mark.parametrize(("ids", "num_tokens"), [([3], 1), ([3], BLOCK), ([5, 0, 8], 2 * BLOCK + 3), ([1, 2], 2 * BLOCK)])
def test_what_is_packed_is_what_is_unpacked(source: str, target: str, ids: list[int], num_tokens: int) -> None:
    here, there = random_pool(source), random_pool(target, seed=9)
    before = there.data.clone()
    payload = poisoned(len(ids) * there.layout.block_bytes)
    pack(here, ids, num_tokens, target, payload)
    landing = [7, 4, 2][: len(ids)]
    unpack(there, landing, target, payload)
    for i, (block, landed) in enumerate(zip(ids, landing, strict=True)):
        valid = min(max(num_tokens - i * BLOCK, 0), BLOCK)
        expected = here.data[block].to(there.data.dtype)
        assert torch.equal(there.data[landed][..., :valid, :], expected[..., :valid, :])
        assert not there.data[landed][..., valid:, :].any(), "positions past the valid tokens are zero (K14)"
    untouched = [b for b in range(9) if b not in landing]
    assert torch.equal(there.data[untouched], before[untouched])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("target", sorted(TORCH_DTYPES))
def test_a_pool_on_a_gpu_packs_into_host_memory(target: str) -> None:
    here, there = random_pool("bf16"), KvPool(KvLayout(target, 3, KV_HEADS, DIM, BLOCK), 9, torch.device("cuda"))
    on_gpu = KvPool(here.layout, 9, torch.device("cuda"))
    on_gpu.data.copy_(here.data)
    payload = poisoned(2 * there.layout.block_bytes)
    pack(on_gpu, [3, 5], 2 * BLOCK, target, payload)
    unpack(there, [1, 0], target, payload)
    assert torch.equal(there.data[[1, 0]].cpu(), here.data[[3, 5]].to(there.data.dtype))


def spec_sum(block: bytes) -> int:
    """kv.proto's digest sum, written down once more in plain Python."""
    total = 0
    for i in range(len(block) // 8):
        x = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        total += int.from_bytes(block[i * 8 : i * 8 + 8], "little") * ((x ^ x >> 31) | 1)
    return total % 2**64


def test_block_sums_are_those_of_the_specification() -> None:
    data = torch.randint(0, 256, (3 * 1024,), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    raw = bytes(data.tolist())
    assert block_sums(data, 3) == [spec_sum(raw[i * 1024 : (i + 1) * 1024]) for i in range(3)]


def test_any_flipped_bit_and_any_swap_changes_the_sum() -> None:
    data = bytearray(blake2b(b"seed").digest() * 8)
    clean = block_sums(torch.frombuffer(data, dtype=torch.uint8), 1)
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert block_sums(torch.frombuffer(data, dtype=torch.uint8), 1) != clean, bit
        data[bit // 8] ^= 1 << bit % 8
    data[0:8], data[8:16] = data[8:16], data[0:8]
    assert block_sums(torch.frombuffer(data, dtype=torch.uint8), 1) != clean
