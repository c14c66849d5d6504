"""Norms, the gate, and what is written into the pool, against the torch ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitfire.engine.kernels import norm as reference_norm
from splitfire.engine.kernels import rope as reference_rope
from splitfire.engine.kernels.gpu.norm import add_rms_norm, silu_mul
from splitfire.engine.kernels.gpu.rope_norm_write import rope_norm_write
from splitfire.engine.kernels.quantise import quantise
from splitfire.engine.kernels.rope import CacheTargets, QkNorm, Rotation
from splitfire.engine.pool import LayerCache

BLOCK, HEADS, KV_HEADS, NUM_TOKENS = 16, 5, 2, 7
EPSILON = torch.finfo(torch.float32).eps


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


def empty_cache(dtype: torch.dtype, dim: int) -> LayerCache:
    elements = torch.full((6, 2, KV_HEADS, BLOCK, dim), 77.0).to(dtype)
    return LayerCache(elements, None if dtype.itemsize > 1 else torch.full((6, 2, KV_HEADS, BLOCK), 3.0).half())


@pytest.mark.parametrize("dim", [16, 64, 80, 96])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_pool_gets_what_torch_would_have_written(dtype: torch.dtype, has_norm: bool, dim: int) -> None:
    """To the bit; after a norm, whose squares are added in another order, up to the last bits of fp32, which move an element by one step
    and a scale by one of fp16 at most."""
    torch.manual_seed(0)
    qkv = torch.randn(NUM_TOKENS, HEADS + 2 * KV_HEADS, dim) * torch.logspace(-3, 2, NUM_TOKENS)[:, None, None]
    angles = torch.rand(NUM_TOKENS, 1, dim // 2) * 6
    rotation = Rotation(angles.cos(), angles.sin())
    norm = QkNorm(torch.rand(dim) + 0.5, torch.rand(dim) + 0.5, 1e-6) if has_norm else None
    targets = CacheTargets(torch.tensor([3, 3, 1, 1, 5, 0, 4]), torch.tensor([14, 15, 0, 1, 2, 7, 15]))
    want, got = empty_cache(dtype, dim), empty_cache(dtype, dim)
    parts = [part.clone() for part in qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)]
    want_q = reference_rope.rope_norm_write(parts[0], parts[1], parts[2], rotation, norm, want, targets)
    got_q = rope_norm_write(qkv, rotation, norm, got, targets)
    if norm is None:
        assert torch.equal(got_q, want_q) and torch.equal(bytes_of(got), bytes_of(want))
        assert got.scales is None or want.scales is None or torch.equal(got.scales, want.scales)
        return
    assert torch.equal(bytes_of(got)[:, 1], bytes_of(want)[:, 1]), "values have no norm"
    bound = 64 * EPSILON * want_q.abs().max()  # 8 roundings of each number, of which hadamard adds up 64 and divides by 8
    torch.testing.assert_close(got_q, want_q, rtol=0, atol=float(bound))
    if got.scales is None or want.scales is None:
        torch.testing.assert_close(got.elements, want.elements, rtol=0, atol=float(bound))
    else:
        torch.testing.assert_close(got.scales, want.scales, rtol=2**-10, atol=0)
        assert (steps_of(got) - steps_of(want)).abs().max() <= 1


def steps_of(cache: LayerCache) -> Tensor:
    """The elements' places among all that their dtype has."""
    bits = bytes_of(cache).int()
    return cache.elements.int() if cache.elements.dtype == torch.int8 else torch.where(bits < 128, bits, 128 - bits)


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
