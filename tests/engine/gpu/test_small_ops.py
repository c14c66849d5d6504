"""Norms, the gate, and what is written into the pool, against the torch ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitfire.engine.kernels import linear as reference_linear
from splitfire.engine.kernels import norm as reference_norm
from splitfire.engine.kernels import rope as reference_rope
from splitfire.engine.kernels.gpu.linear import linear
from splitfire.engine.kernels.gpu.norm import add_rms_norm, silu_mul
from splitfire.engine.kernels.gpu.rope_norm_write import rope_norm_write
from splitfire.engine.kernels.linear import quantise_rows
from splitfire.engine.kernels.quantise import quantise
from splitfire.engine.kernels.rope import CacheTargets, QkNorm, Rotation
from splitfire.engine.pool import LayerCache

BLOCK, HEADS, KV_HEADS, NUM_TOKENS = 16, 5, 2, 7


@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 16), (3, 100), (2, 1025)])
def test_norms_and_gates_are_those_of_torch(rows: int, width: int) -> None:
    torch.manual_seed(0)
    hidden, update, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    want = reference_norm.rms_norm(hidden, weight, 1e-5)
    torch.testing.assert_close(add_rms_norm(hidden, None, weight, 1e-5), want)
    total = hidden + update
    torch.testing.assert_close(add_rms_norm(hidden, update, weight, 1e-5), reference_norm.rms_norm(total, weight, 1e-5))
    assert torch.equal(hidden, total)
    gate_up = torch.randn(rows, 2 * width)
    torch.testing.assert_close(silu_mul(gate_up), reference_norm.silu_mul(gate_up))


@pytest.mark.parametrize(
    ("rows", "columns", "inputs"), [(0, 8, 16), (1, 1, 16), (1, 33, 300), (17, 40, 257), (32, 64, 512), (33, 16, 64)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_int8_product_is_that_of_torch(rows: int, columns: int, inputs: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, matrix, bias = (
        torch.randn(rows, inputs),
        quantise_rows(torch.randn(columns, inputs)),
        torch.randn(columns) if has_bias else None,
    )
    torch.testing.assert_close(linear(x, matrix, bias), reference_linear.linear(x, matrix, bias), rtol=1e-5, atol=1e-4)
    plain = torch.randn(columns, inputs)
    torch.testing.assert_close(linear(x, plain, bias), reference_linear.linear(x, plain, bias))


def empty_cache(dtype: torch.dtype, dim: int) -> LayerCache:
    elements = torch.full((6, 2, KV_HEADS, BLOCK, dim), 77.0).to(dtype)
    return LayerCache(elements, None if dtype.itemsize > 1 else torch.full((6, 2, KV_HEADS, BLOCK), 3.0).half())


@pytest.mark.parametrize("dim", [16, 48, 64, 80])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_pool_gets_what_torch_would_have_written(dtype: torch.dtype, has_norm: bool, dim: int) -> None:
    """Up to the order in which a norm's squares are added: that may move a number over the middle between two elements."""
    torch.manual_seed(0)
    qkv = torch.randn(NUM_TOKENS, HEADS + 2 * KV_HEADS, dim) * torch.logspace(-3, 2, NUM_TOKENS)[:, None, None]
    angles = torch.rand(NUM_TOKENS, 1, dim // 2) * 6
    rotation = Rotation(angles.cos(), angles.sin())
    norm = QkNorm(torch.rand(dim) + 0.5, torch.rand(dim) + 0.5, 1e-6) if has_norm else None
    targets = CacheTargets(torch.tensor([3, 3, 1, 1, 5, 0, 4]), torch.tensor([14, 15, 0, 1, 2, 7, 15]))
    want, got = empty_cache(dtype, dim), empty_cache(dtype, dim)
    parts = [part.clone() for part in qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)]
    want_q = reference_rope.rope_norm_write(parts[0], parts[1], parts[2], rotation, norm, want, targets)
    torch.testing.assert_close(rope_norm_write(qkv, rotation, norm, got, targets), want_q, rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(got.elements, want.elements, rtol=1e-5, atol=1e-5)
        return
    assert got.scales is not None and want.scales is not None
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-3, atol=0)
    assert (bytes_of(got) != bytes_of(want)).float().mean() < 0.002
    assert (bytes_of(got)[:, 1] == bytes_of(want)[:, 1]).all(), "values are only rounded"


def bytes_of(cache: LayerCache) -> Tensor:
    return cache.elements.view(torch.uint8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, who computes for the interpreter
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_odd_vectors_are_quantised_as_torch_does(dtype: torch.dtype) -> None:
    """Zeros, numbers too small for a scale, too large for one, and none."""
    vectors = torch.stack([
        torch.zeros(32), torch.full((32,), 1e-9), torch.full((32,), 1e8), torch.linspace(-3, 3, 32), torch.linspace(-448, 448, 32),
        torch.tensor([1.0] * 31 + [torch.nan]), torch.tensor([1.0] * 31 + [torch.inf]),
    ])  # fmt: skip
    qkv = vectors[:, None].expand(-1, HEADS + 2 * KV_HEADS, -1).contiguous()
    still = Rotation(torch.ones(NUM_TOKENS, 1, 16), torch.zeros(NUM_TOKENS, 1, 16))
    cache = empty_cache(dtype, 32)
    rope_norm_write(qkv, still, None, cache, CacheTargets(torch.full((NUM_TOKENS,), 2), torch.arange(NUM_TOKENS)))
    elements, scales = quantise(vectors, dtype)
    assert cache.scales is not None
    for head in range(KV_HEADS):
        assert torch.equal(bytes_of(cache)[2, 1, head, :NUM_TOKENS], elements.view(torch.uint8))
        torch.testing.assert_close(cache.scales[2, 1, head, :NUM_TOKENS], scales, rtol=0, atol=0, equal_nan=True)


def test_a_token_without_a_block_is_written_nowhere() -> None:
    cache = empty_cache(torch.float32, 16)
    still = Rotation(torch.ones(NUM_TOKENS, 1, 8), torch.zeros(NUM_TOKENS, 1, 8))
    targets = CacheTargets(torch.full((NUM_TOKENS,), -1), torch.arange(NUM_TOKENS))
    rope_norm_write(torch.randn(NUM_TOKENS, HEADS + 2 * KV_HEADS, 16), still, None, cache, targets)
    assert (cache.elements == 77).all()
