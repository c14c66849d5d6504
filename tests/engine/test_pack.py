"""pack and unpack: every pair of dtypes, awkward shapes, garbage past the valid tokens; one meaning whoever computes it."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from hashlib import blake2b

import pytest
import torch

from splitfire.core.layout import DTYPE_BYTES, QUANTISED, KvLayout
from splitfire.engine.kernels import native
from splitfire.engine.kernels.pack import block_sums, pack, pack_reference, unpack, unpack_reference
from splitfire.engine.kernels.quantise import dequantise, hadamard, quantise
from splitfire.engine.pool import TORCH_DTYPES, KvPool, elements_of, scales_of

CPU = torch.device("cpu")
DTYPES = sorted(DTYPE_BYTES)
LAYOUT = KvLayout("fp32", num_layers=2, num_kv_heads=2, head_dim=24, block_size=16)
NUM_BLOCKS = 9
SIZE = LAYOUT.block_size
BODIES = {"chosen": (pack, unpack), "torch": (pack_reference, unpack_reference)}


def random_pool(layout: KvLayout, seed: int = 0) -> KvPool:
    """Vectors of very different size, so that a scale in a wrong place shows; zero padding."""
    generator = torch.Generator().manual_seed(seed)
    pool = KvPool(layout, NUM_BLOCKS, CPU)
    x = (
        torch.randn(pool.elements.shape, generator=generator)
        * 10 ** (torch.rand(pool.elements.shape[:-1], generator=generator) * 4 - 2)[..., None]
    )
    fill(pool, slice(None), x)
    return pool


def fill(pool: KvPool, where: slice | int, x: torch.Tensor) -> None:
    """x is what the cache holds: in a quantised one, keys that are transformed already."""
    if pool.scales is None:
        pool.elements[where] = x.to(pool.elements.dtype)
    else:
        pool.elements[where], pool.scales[where] = quantise(x, pool.elements.dtype)


def meaning(pool: KvPool, block: int) -> torch.Tensor:
    """[*block_shape] fp32, as `fill` takes it."""
    return pool.elements[block].float() if pool.scales is None else dequantise(pool.elements[block], pool.scales[block])


def transform_keys(x: torch.Tensor) -> torch.Tensor:
    """[num_layers, 2, num_kv_heads, block_size, head_dim] -> the same, between what quantised and other caches hold."""
    return torch.stack((hadamard(x[:, 0]), x[:, 1]), 1)


def poisoned(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


def spoil(pool: KvPool, block: int, valid: int) -> None:
    """What stands past the valid tokens may be anything, also NaN."""
    pool.elements.view(torch.uint8)[block, ..., valid:, :] = 0xFF
    if pool.scales is not None:
        pool.scales[block, ..., valid:] = torch.nan


def spec_sum(block: bytes) -> int:
    """kv.proto's digest sum, written down once more in plain Python."""
    total = 0
    for i in range(len(block) // 8):
        x = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        total += int.from_bytes(block[i * 8 : i * 8 + 8], "little") * ((x ^ x >> 31) | 1)
    return total % 2**64


def spec_sums(payload: torch.Tensor, num_blocks: int) -> list[int]:
    raw = payload.numpy().tobytes()
    size = len(raw) // num_blocks
    return [spec_sum(raw[i * size : (i + 1) * size]) for i in range(num_blocks)]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize(("ids", "num_tokens"), [([3], 1), ([3], SIZE), ([5, 0, 8], 2 * SIZE + 3), ([1, 2], 2 * SIZE), ([6, 4], 5)])
def test_what_is_packed_is_what_is_unpacked(body: str, source: str, target: str, ids: list[int], num_tokens: int) -> None:
    pack_with, unpack_with = BODIES[body]
    here, there = random_pool(replace(LAYOUT, dtype=source)), random_pool(replace(LAYOUT, dtype=target), seed=9)
    before = there.raw.clone()
    for i, block in enumerate(ids):
        spoil(here, block, min(max(num_tokens - i * SIZE, 0), SIZE))
    payload = poisoned(len(ids) * there.layout.block_bytes)
    sums = pack_with(here, ids, num_tokens, target, payload)
    assert sums == spec_sums(payload, len(ids))
    landing = [7, 4, 2][: len(ids)]
    assert unpack_with(there, landing, payload) == sums
    for i, (block, landed) in enumerate(zip(ids, landing, strict=True)):
        valid = min(max(num_tokens - i * SIZE, 0), SIZE)
        wide = meaning(here, block)
        if here.layout.is_quantised != there.layout.is_quantised:
            wide = transform_keys(wide)
        wide = wide[..., :valid, :]
        if source == target:
            assert_same_bytes(there.elements[landed][..., :valid, :], here.elements[block][..., :valid, :])
        elif there.scales is None:
            assert_same_bytes(there.elements[landed][..., :valid, :], wide.to(there.elements.dtype))
        else:
            elements, scales = quantise(wide, there.elements.dtype)
            assert_same_bytes(there.elements[landed][..., :valid, :], elements)
            assert torch.equal(there.scales[landed][..., :valid], scales)
            assert not there.scales[landed][..., valid:].any()
        assert not there.elements[landed][..., valid:, :].float().any(), "positions past the valid tokens are zero (K14)"
    assert not there.raw[landing, there.layout.content_bytes :].any(), "so is the padding"
    untouched = [b for b in range(NUM_BLOCKS) if b not in landing]
    assert torch.equal(there.raw[untouched], before[untouched])


def assert_same_bytes(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", sorted(QUANTISED))
def test_keys_and_values_come_back_from_a_quantised_pool_as_what_they_were(body: str, dtype: str) -> None:
    """Within a step of the vector's largest number, also keys whose block was transformed there and back."""
    pack_with, unpack_with = BODIES[body]
    here, there = random_pool(LAYOUT), KvPool(replace(LAYOUT, dtype=dtype), NUM_BLOCKS, CPU)
    payload, back = poisoned(there.layout.block_bytes), poisoned(LAYOUT.block_bytes)
    pack_with(here, [3], SIZE, dtype, payload)
    unpack_with(there, [1], payload)
    pack_with(there, [1], SIZE, "fp32", back)
    error = (elements_of(back.view(1, -1), LAYOUT)[0] - here.elements[3]).norm(dim=-1) / here.elements[3].norm(dim=-1)
    assert error.max() < (0.01 if dtype == "int8" else 0.05)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_what_is_not_finite_stays_so_and_stays_where_it_is(body: str, source: str, target: str) -> None:
    here = random_pool(replace(LAYOUT, dtype=source))
    x = meaning(here, 3).clone()
    x[1, 0, 1, 5, 7], x[1, 1, 0, 9, 0], x[0, 0, 0, 0, 23] = torch.nan, torch.inf, -torch.inf
    fill(here, 3, x)
    layout = replace(LAYOUT, dtype=target)
    payload = poisoned(layout.block_bytes)
    BODIES[body][0](here, [3], SIZE, target, payload)
    wire = payload.view(1, -1)
    got = elements_of(wire, layout)[0].float()
    if layout.is_quantised:
        got = dequantise(elements_of(wire, layout)[0], scales_of(wire, layout)[0])
    bad = ~x.isfinite()
    if here.scales is not None or layout.is_quantised:  # the whole vector shares the scale
        bad = bad.any(-1, keepdim=True).expand(x.shape)
        assert got[bad].isnan().all()
    else:
        assert torch.equal(
            got[bad].nan_to_num(), x[bad].nan_to_num() if target == "fp32" else x[bad].to(TORCH_DTYPES[target]).float().nan_to_num()
        )
    assert got[~bad].isfinite().all()


def test_no_digest_when_nobody_asks_for_one() -> None:
    here = random_pool(LAYOUT)
    for pack_with, unpack_with in BODIES.values():
        payload, same = poisoned(LAYOUT.block_bytes), poisoned(LAYOUT.block_bytes)
        assert pack_with(here, [3], SIZE, "fp32", payload, digest=False) == []
        pack_with(here, [3], SIZE, "fp32", same)
        assert torch.equal(payload, same)
        assert unpack_with(here, [4], payload, digest=False) == []
        assert torch.equal(here.raw[4], here.raw[3])


@pytest.mark.parametrize("body", BODIES)
def test_blocks_and_payloads_that_do_not_exist_are_refused(body: str) -> None:
    pack_with, unpack_with = BODIES[body]
    pool, payload = random_pool(LAYOUT), poisoned(LAYOUT.block_bytes)
    for ids in ([NUM_BLOCKS], [-NUM_BLOCKS - 1]):
        with pytest.raises(IndexError):
            pack_with(pool, ids, 1, "fp32", payload)
        with pytest.raises(IndexError):
            unpack_with(pool, ids, payload)
    for wrong in (poisoned(LAYOUT.block_bytes - 64), poisoned(2 * LAYOUT.block_bytes)):
        with pytest.raises(RuntimeError):
            pack_with(pool, [1], 1, "fp32", wrong)
        with pytest.raises(RuntimeError):
            unpack_with(pool, [1], wrong)


# -- the compiled op and the reference: the same bytes, whatever the input

AWKWARD = [  # num_layers, num_kv_heads, head_dim, block_size
    KvLayout("fp32", *shape)
    for shape in [
        (1, 1, 8, 8),
        (2, 3, 24, 8),
        (1, 1, 40, 16),
        (2, 1, 80, 64),
        (1, 2, 96, 32),
        (3, 1, 128, 16),
        (1, 1, 7, 8),
        (1, 1, 1031, 8),
        (1, 3, 10, 8),
        (2, 2, 36, 8),
        (2, 2, 64, 16),
        (1, 1, 2048, 8),
    ]
]
compiled = pytest.mark.skipif(not native.is_available(), reason="installed without a compiler: torch does its work")


def any_bits(layout: KvLayout, seed: int) -> KvPool:
    """Every bit at random: subnormals, infinities, NaN of every kind, scales that never were. Half of the vectors are ordinary."""
    pool = random_pool(layout, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, pool.raw.shape, dtype=torch.uint8, generator=generator)
    wild = torch.rand(pool.elements.shape[:-1], generator=generator) < 0.5
    pool.elements[wild] = elements_of(noise, layout)[wild]
    if pool.scales is not None:
        pool.scales[wild] = scales_of(noise, layout)[wild]
    return pool


@compiled
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("shape", AWKWARD, ids=lambda s: f"{s.num_layers}x{s.num_kv_heads}x{s.head_dim}-{s.block_size}")
def test_the_compiled_op_writes_what_torch_writes(source: str, target: str, shape: KvLayout) -> None:
    draw = random.Random(f"{source}{target}{shape}")
    pool = any_bits(replace(shape, dtype=source), draw.randrange(2**31))
    layout, size = replace(shape, dtype=target), shape.block_size
    for ids, num_tokens in (
        ([8], 1),
        ([8], size),
        ([5, 0, 7], 0),
        ([5, 0, 7], size - 1),
        ([5, 0, 7], 3 * size - draw.randrange(size)),
    ):
        ours, theirs = (poisoned(len(ids) * layout.block_bytes) for _ in range(2))
        sums = pack(pool, ids, num_tokens, target, ours)
        assert sums == pack_reference(pool, ids, num_tokens, target, theirs)
        assert torch.equal(ours, theirs)
        assert pack(pool, ids, num_tokens, target, theirs.fill_(0xFF), digest=False) == []
        assert torch.equal(ours, theirs)
    assert sums == spec_sums(ours, 3)


@compiled
def test_every_fp32_that_rounds_in_a_special_way_is_rounded_like_torch() -> None:
    """All 16-bit patterns as the upper half, with lower halves on, beside and between the ties of bf16 and fp16."""
    layout = KvLayout("fp32", num_layers=1, num_kv_heads=1, head_dim=64, block_size=64)
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    for lower in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        pool = KvPool(layout, 8, CPU)
        pool.elements.view(torch.int32).copy_((upper | lower).view(8, 1, 2, 1, 64, 64))
        for target in ("bf16", "fp16"):
            ours, theirs = (poisoned(8 * replace(layout, dtype=target).block_bytes) for _ in range(2))
            pack(pool, range(8), 8 * 64, target, ours)
            pack_reference(pool, range(8), 8 * 64, target, theirs)
            assert torch.equal(ours, theirs)


@compiled
@pytest.mark.parametrize("target", ["int8", "fp8_e4m3"])
def test_divisions_near_the_middle_of_two_numbers_are_torchs(target: str) -> None:
    """The compiled op divides by way of the inverse: every significand of a scale, and quotients on and right beside ties."""
    layout = KvLayout("fp32", num_layers=1, num_kv_heads=1, head_dim=128, block_size=64)
    pool, largest = KvPool(layout, 32, CPU), 127.0 if target == "int8" else 448.0
    scales = (1 + torch.arange(1024) / 1024).repeat(2) * torch.logspace(-12, 6, 2048, base=2).log2().round().exp2()
    ties = torch.linspace(-largest, largest, 63) if target == "fp8_e4m3" else torch.arange(-31, 32) + 0.5
    x = torch.empty(2048, 128)
    x[:, 0], x[:, 1] = scales * largest, 0.0
    x[:, 2:65] = scales[:, None] * ties
    x[:, 65:128] = torch.nextafter(x[:, 2:65], torch.zeros(()))
    pool.elements[:, :, 1] = x.view(32, 1, 1, 64, 128)  # values: keys are transformed first, and leave the ties
    ours, theirs = (poisoned(32 * replace(layout, dtype=target).block_bytes) for _ in range(2))
    pack(pool, range(32), 32 * 64, target, ours)
    pack_reference(pool, range(32), 32 * 64, target, theirs)
    assert torch.equal(ours, theirs)


def test_where_there_is_a_compiler_the_op_was_compiled() -> None:
    """Or nobody would notice that it never is."""
    assert native.is_available() or shutil.which("g++") is None


def test_a_payload_at_an_odd_address_falls_back_to_torch() -> None:
    pool, aligned = random_pool(LAYOUT), poisoned(LAYOUT.block_bytes)
    odd = torch.frombuffer(bytearray(LAYOUT.block_bytes + 8), dtype=torch.uint8, offset=1, count=LAYOUT.block_bytes)
    assert odd.data_ptr() % 8
    assert pack(pool, [2], 5, "fp32", odd) == pack(pool, [2], 5, "fp32", aligned)
    assert torch.equal(odd, aligned)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0", reason="needs a CUDA device; make test-gpu"
)
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_a_pool_on_a_gpu_is_packed_to_the_same_bytes(source: str, target: str, place: str) -> None:
    """Into host memory and into its own; keys of 128 elements are divided by a root that is not a power of two."""
    shape = KvLayout("fp32", num_layers=2, num_kv_heads=2, head_dim=128, block_size=16)
    here = any_bits(replace(shape, dtype=source), seed=5)
    on_gpu, there = (KvPool(replace(shape, dtype=d), NUM_BLOCKS, torch.device("cuda")) for d in (source, target))
    on_gpu.raw.copy_(here.raw)
    expected = poisoned(2 * there.layout.block_bytes)
    payload = expected.to(place)
    sums = pack(on_gpu, [3, 5], SIZE + 7, target, payload)
    assert pack_reference(here, [3, 5], SIZE + 7, target, expected) == sums
    assert torch.equal(payload.cpu(), expected)
    assert unpack(there, [1, 0], payload) == sums
    assert torch.equal(there.raw[[1, 0]].cpu().flatten(), expected)


def test_block_sums_are_those_of_the_specification() -> None:
    data = torch.randint(0, 256, (3 * 1024,), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    assert block_sums(data, 3) == spec_sums(data, 3)


def test_any_flipped_bit_and_any_swap_changes_the_sum() -> None:
    data = bytearray(blake2b(b"seed").digest() * 8)
    clean = block_sums(torch.frombuffer(data, dtype=torch.uint8), 1)
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert block_sums(torch.frombuffer(data, dtype=torch.uint8), 1) != clean, bit
        data[bit // 8] ^= 1 << bit % 8
    data[0:8], data[8:16] = data[8:16], data[0:8]
    assert block_sums(torch.frombuffer(data, dtype=torch.uint8), 1) != clean
