"""Each op against plain torch in fp32, on awkward sizes, outputs and unused memory poisoned."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from splitfire.engine.kernels.attention import QUERY_TILE, QuerySpan, attend, plan_attention
from splitfire.engine.kernels.norm import rms_norm, silu_mul
from splitfire.engine.kernels.quantise import LARGEST, dequantise, hadamard, quantise
from splitfire.engine.kernels.rope import CacheTargets, Rotation, rope_norm_write, rotate
from splitfire.engine.pool import LayerCache

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
    out = scaled_dot_product_attention(
        q.float().transpose(0, 1)[None], keys[None], values[None], attn_mask=seen, scale=q.shape[-1] ** -0.5
    )
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
    out = attend(q, LayerCache(cache, None), plan_attention(spans, CPU), DIM**-0.5, window)
    assert not out.isnan().any()
    for span, kv in zip(spans, contents, strict=True):
        expected = reference(q[span.begin : span.end], kv, window)
        torch.testing.assert_close(out[span.begin : span.end], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_attention_is_as_good_as_plain_torchs(dtype: torch.dtype) -> None:
    q, cache, spans, contents = attention_case([(40, 100), (1, 77)], dtype)
    out = attend(q, LayerCache(cache, None), plan_attention(spans, CPU), DIM**-0.5)
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


# -- quantised caches


def quantised_cache(cache: torch.Tensor, dtype: torch.dtype) -> LayerCache:
    """The same KV quantised. What was NaN has NaN scales, and elements that would show if they were seen."""
    elements, scales = quantise(cache, dtype)
    elements.view(torch.uint8)[scales.isnan()] = 0x55
    return LayerCache(elements, scales)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shapes", [[(1, 1)], [(17, 40), (1, 9), (QUERY_TILE + 1, QUERY_TILE + 30), (1, 250)], [(300, 300)]])
def test_attention_over_a_quantised_cache_is_attention_over_what_it_stands_for(
    shapes: list[tuple[int, int]], window: int | None, dtype: torch.dtype
) -> None:
    """Exactly: to the bit what an fp32 cache of the dequantised numbers gives. And no NaN scale of a position that was never
    written gets into it."""
    q, cache, spans, _ = attention_case(shapes)
    quantised = quantised_cache(cache, dtype)
    assert quantised.scales is not None and quantised.scales.isnan().any()
    plan = plan_attention(spans, CPU)
    out = attend(q, quantised, plan, DIM**-0.5, window)
    assert out.isfinite().all()
    same = LayerCache(dequantise(quantised.elements, quantised.scales), None)
    assert torch.equal(out, attend(q, same, plan, DIM**-0.5, window))
    exact = attend(q, LayerCache(cache, None), plan, DIM**-0.5, window)
    assert (out - exact).norm() / exact.norm() < (0.015 if dtype == torch.int8 else 0.06)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_cache_write_quantises_each_heads_vector_by_itself(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(5, heads, DIM, generator=generator) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    k *= torch.tensor([1.0, 100.0])[:, None]  # heads of different size: a scale of the wrong head shows
    angles = torch.rand(5, 1, DIM // 2, generator=generator)
    rotation = Rotation(angles.cos(), angles.sin())
    cache = LayerCache(
        torch.full((4, 2, KV_HEADS, BLOCK, DIM), 77.0).to(dtype), torch.full((4, 2, KV_HEADS, BLOCK), float("nan")).half()
    )
    targets = CacheTargets(torch.tensor([3, 3, 1, 1, 1]), torch.tensor([14, 15, 0, 1, 2]))
    rope_norm_write(q, k, v, rotation, None, cache, targets)
    assert cache.scales is not None
    kv = dequantise(cache.elements, cache.scales)
    for token, (block, offset) in enumerate(zip(targets.blocks.tolist(), targets.offsets.tolist(), strict=True)):
        for side, x in enumerate((hadamard(rotate(k, rotation)), v)):
            expected = dequantise(*quantise(x[token], dtype))
            assert torch.equal(kv[block, side, :, offset], expected)
            error = (kv[block, side, :, offset] - x[token]).abs().amax(-1) / x[token].abs().amax(-1)
            assert (error < (0.005 if dtype == torch.int8 else 0.04)).all()
    written = torch.zeros(4, BLOCK, dtype=torch.bool)
    written[targets.blocks, targets.offsets] = True
    assert cache.scales.permute(0, 3, 1, 2)[~written].isnan().all()


class Inputs(NamedTuple):
    """Made-up attention of one sequence, [NUM_TOKENS, heads, WIDE] each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Written(NamedTuple):
    """A cache of one sequence, from block 1 on, and the queries of its last tokens, as the op that wrote it returned them."""

    q: torch.Tensor  # [NUM_QUERIES, heads, WIDE]
    cache: LayerCache


NUM_TOKENS, NUM_QUERIES, WIDE = 512, 64, 64


def write_all(inputs: Inputs, rotation: Rotation, dtype: torch.dtype) -> Written:
    shape = (NUM_TOKENS // BLOCK + 1, 2, KV_HEADS, BLOCK)
    scales = torch.zeros(shape).half() if dtype in LARGEST else None
    cache = LayerCache(torch.zeros(*shape, WIDE).to(dtype), scales)
    tokens = torch.arange(NUM_TOKENS)
    q = rope_norm_write(*inputs, rotation, None, cache, CacheTargets(1 + tokens // BLOCK, tokens % BLOCK))
    return Written(q[-NUM_QUERIES:], cache)


def attend_all(written: Written) -> torch.Tensor:
    span = QuerySpan(0, NUM_QUERIES, NUM_TOKENS, tuple(range(1, NUM_TOKENS // BLOCK + 1)))
    return attend(written.q, written.cache, plan_attention([span], CPU), WIDE**-0.5)


def made_up(seed: int, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    return Inputs(*(torch.randn(NUM_TOKENS, n, WIDE, generator=generator).to(dtype) for n in heads))


def angles(seed: int) -> Rotation:
    x = torch.rand(NUM_TOKENS, 1, WIDE // 2, generator=torch.Generator().manual_seed(seed)) * 6
    return Rotation(x.cos(), x.sin())


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_attention_by_way_of_a_quantised_cache_is_the_same_attention(dtype: torch.dtype, low: torch.dtype) -> None:
    """Queries and keys are transformed together or not at all, whatever the model computes in."""
    exact, quantised = (attend_all(write_all(made_up(5, low), angles(6), d)).float() for d in (low, dtype))
    assert (exact - quantised).norm() / exact.norm() < (0.02 if dtype == torch.int8 else 0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_that_is_not_quantised_holds_the_keys_themselves(dtype: torch.dtype) -> None:
    q, k, v = inputs = made_up(7, dtype)
    written = write_all(inputs, angles(8), dtype)
    keys, values = written.cache.elements[1:].permute(1, 0, 3, 2, 4).reshape(2, NUM_TOKENS, KV_HEADS, WIDE)
    assert torch.equal(written.q, rotate(q, angles(8))[-NUM_QUERIES:])
    assert torch.equal(keys, rotate(k, angles(8))) and torch.equal(values, v)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("varies", [False, True])
def test_outlier_channels_of_keys_cost_int8_little(varies: bool, seed: int) -> None:
    """Three channels 20 to 50 times as large: 10 dB better than a cast of everything to e4m3, as without outliers."""
    q, k, v = inputs = made_up(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    for head in range(KV_HEADS):
        channels = torch.randperm(WIDE, generator=generator)[:3]
        sizes = 20 + 30 * torch.rand(3, generator=generator)
        k[:, head, channels] = sizes * (k[:, head, channels] if varies else 1 + 0.1 * k[:, head, channels])
    still = Rotation(torch.ones(NUM_TOKENS, 1, WIDE // 2), torch.zeros(NUM_TOKENS, 1, WIDE // 2))  # channels stay channels
    exact = reference(q[-NUM_QUERIES:], torch.stack((k, v)).transpose(1, 2), None)
    ours = attend_all(write_all(inputs, still, torch.int8))
    cast = Inputs(q, *(x.to(torch.float8_e4m3fn).float() for x in (k, v)))
    theirs = attend_all(write_all(cast, still, torch.float32))
    noise = [(out - exact).square().sum() / exact.square().sum() for out in (ours, theirs)]
    assert 10 * math.log10(noise[1] / noise[0]) >= 10


@pytest.mark.parametrize("window", [None, 16])
def test_rows_before_one_that_is_not_finite_do_not_know_of_it(window: int | None) -> None:
    """A draft that is wrong may have any KV; the row that finds it wrong stands before it. The rows after it see it."""
    q, cache, [span], [kv] = attention_case([(QUERY_TILE + 20, QUERY_TILE + 50)])
    at = 30 + QUERY_TILE + 4
    cache[span.block_ids[at // BLOCK], 1, 1, at % BLOCK, 3] = float("nan")
    out = attend(q, LayerCache(cache, None), plan_attention([span], CPU), DIM**-0.5, window)
    torch.testing.assert_close(out[: at - 30], reference(q, kv, window)[: at - 30], rtol=1e-5, atol=1e-5)
    assert out[at - 30 :, GROUP : 2 * GROUP].isnan().any(-1).all()
