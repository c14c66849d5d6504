"""pack and unpack in Triton: the bytes and the sums of the torch bodies, whatever the bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitfire.core.layout import KvLayout
from splitfire.engine.kernels import pack as chosen
from splitfire.engine.kernels.gpu import pack as gpu
from splitfire.engine.kernels.pack import pack_reference
from splitfire.engine.pool import KvPool
from tests.engine.test_pack import DTYPES, NUM_BLOCKS, any_bits, poisoned, random_pool, spec_sums

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, who computes for the interpreter
AWKWARD = KvLayout("fp32", num_layers=1, num_kv_heads=3, head_dim=72, block_size=8)  # keys and values: a piece and a half each
SIZE = AWKWARD.block_size


def assert_packs_alike(pool: KvPool, ids: list[int], num_tokens: int, dtype: str) -> None:
    layout = replace(pool.layout, dtype=dtype)
    got, want = (poisoned(len(ids) * layout.block_bytes) for _ in range(2))
    sums = [s & (1 << 64) - 1 for s in gpu.pack(pool, ids, num_tokens, dtype, got).tolist()]
    assert sums == pack_reference(pool, ids, num_tokens, dtype, want)
    assert torch.equal(got, want)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_blocks_are_packed_as_torch_packs_them(source: str, target: str) -> None:
    """A whole block, one in part, and one without any valid token."""
    pool = any_bits(replace(AWKWARD, dtype=source), seed=len(source) + 7 * len(target))
    assert_packs_alike(pool, [5, 0, 7], SIZE + 3, target)


@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        ("bf16", "int8", (2, 2, 64, 16)),  # layers, heads, head_dim, block size
        ("fp8_e4m3", "fp32", (2, 1, 128, 8)),
        ("fp8_e4m3", "bf16", (1, 1, 7, 4)),  # parts of a byte, and padding
        ("fp16", "int8", (1, 1, 5, 4)),
        ("int8", "int8", (1, 1, 7, 4)),
        ("fp16", "fp16", (1, 3, 86, 8)),  # 64 bytes over a piece
    ],
)  # fmt: skip
def test_other_shapes_are_packed_as_well(source: str, target: str, shape: tuple[int, int, int, int]) -> None:
    layout = KvLayout(source, *shape)
    pool = any_bits(layout, seed=3)
    pool.raw[:, layout.content_bytes :] = 0xFF
    for num_tokens in (1, layout.block_size, 2 * layout.block_size - 1):
        assert_packs_alike(pool, [8, 2], num_tokens, target)


@pytest.mark.parametrize("target", ["bf16", "fp16"])
def test_numbers_in_the_middle_are_rounded_to_even(target: str) -> None:
    """On, beside and between the ties of both, at every exponent."""
    layout = KvLayout("fp32", num_layers=1, num_kv_heads=1, head_dim=64, block_size=64)
    upper = (torch.arange(2**16 // 19, dtype=torch.int32) * 19)[: 2**13 * 3 // 8] << 16
    lower = torch.tensor([0, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32)
    pool = KvPool(layout, 3, torch.device("cpu"))
    pool.elements.view(torch.int32).copy_((upper[:, None] | lower).view(3, 1, 2, 1, 64, 64))
    assert_packs_alike(pool, [0, 1, 2], 3 * 64, target)


def test_a_payload_is_unpacked_into_its_blocks_and_no_others() -> None:
    layout = KvLayout("fp16", num_layers=1, num_kv_heads=3, head_dim=86, block_size=8)
    assert layout.block_bytes == 8 * gpu.WORDS + 64
    pool = any_bits(layout, seed=1)
    before = pool.raw.clone()
    payload = torch.randint(0, 256, (2 * layout.block_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    sums = gpu.unpack(pool, [6, 1], payload)
    assert [s & (1 << 64) - 1 for s in sums.tolist()] == spec_sums(payload, 2)
    assert torch.equal(pool.raw[[6, 1]].flatten(), payload)
    others = [b for b in range(NUM_BLOCKS) if b not in (6, 1)]
    assert torch.equal(pool.raw[others], before[others])


@pytest.mark.parametrize("target", ["fp32", "int8"])
def test_nothing_is_summed_when_nobody_asks(target: str) -> None:
    pool = any_bits(replace(AWKWARD, dtype="fp32"), seed=4)
    got, want = (poisoned(replace(AWKWARD, dtype=target).block_bytes) for _ in range(2))
    assert gpu.pack(pool, [3], SIZE, target, got, digest=False).tolist() == [0]
    pack_reference(pool, [3], SIZE, target, want)
    assert torch.equal(got, want)
    if target == "fp32":
        assert gpu.unpack(pool, [4], got, digest=False).tolist() == [0]
        assert torch.equal(pool.raw[4], got)
    assert gpu.pack(pool, [], 0, target, got[:0]).tolist() == []
    assert gpu.unpack(pool, [], got[:0]).tolist() == []


def test_a_pool_on_a_gpu_is_packed_by_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only says it is there."""
    pool, payload = random_pool(AWKWARD), poisoned(AWKWARD.block_bytes)
    expected = pack_reference(pool, [3], SIZE - 1, "fp32", payload.clone())
    pool.device = torch.device("cuda")
    for name in ("pack_reference", "unpack_reference"):
        monkeypatch.setattr(chosen, name, lambda *_args, **_kwargs: pytest.fail("not on a GPU"))
    assert chosen.pack(pool, [3], SIZE - 1, "fp32", payload) == expected == spec_sums(payload, 1)
    assert chosen.unpack(pool, [4], payload) == expected
    assert torch.equal(pool.raw[4], payload)
    assert chosen.unpack(pool, [5], payload, digest=False) == []
    for ids in ([NUM_BLOCKS], [-1]):
        with pytest.raises(IndexError):
            chosen.pack(pool, ids, 1, "fp32", payload)
        with pytest.raises(IndexError):
            chosen.unpack(pool, ids, payload)
