"""The arithmetic of quantised KV, against its formulas written down once more in plain Python."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch

from splitfire.engine.kernels.quantise import LARGEST, dequantise, hadamard, quantise

DTYPES = sorted(LARGEST, key=str)


def fp32(x: float) -> float:
    """Rounded to single precision."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def fp16(x: float) -> float:
    try:
        return float(struct.unpack("<e", struct.pack("<e", x))[0])
    except OverflowError:
        return math.inf


def e4m3_values() -> list[float]:
    """What the codes 0..126 stand for (Micikevicius et al. 2022, table 1): no infinity, one NaN, 448 the largest."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    return values


E4M3 = e4m3_values()


def nearest_e4m3(x: float) -> int:
    """The code of the nearest value, ties to the even code; the sign stays."""
    size = abs(x)
    best = min(range(127), key=lambda code: (abs(E4M3[code] - size), code % 2))
    return best | (0x80 if math.copysign(1, x) < 0 else 0)


def plain_quantise(vector: list[float], dtype: torch.dtype) -> tuple[list[int], float]:
    """Element bytes and the scale."""
    largest = LARGEST[dtype]
    scale = fp16(fp32(max(abs(x) for x in vector) / largest)) if all(map(math.isfinite, vector)) else math.nan
    if not math.isfinite(scale):
        return [0] * len(vector), math.nan
    if scale == 0:
        return [0] * len(vector), 0.0
    ratios = [min(max(fp32(x / scale), -largest), largest) for x in vector]
    return [round(r) & 0xFF for r in ratios] if dtype == torch.int8 else [nearest_e4m3(r) for r in ratios], scale


def element_bytes(elements: torch.Tensor) -> list[int]:
    return [int(b) for b in elements.view(torch.uint8).tolist()]


VECTORS = {
    "zeros": [0.0, -0.0, 0.0, 0.0],
    "one": [1.0, -1.0, 0.5, 0.25],
    "halves": [127.0, 0.5, 1.5, -2.5],  # scale 1 for int8: ties
    "outlier": [1e3, 1e-3, 2.0, -3.0],
    "largest finite scale": [65504.0 * 127, 1.0, -4e6, 0.0],
    "scale beyond fp16": [1e8, 1.0, 0.0, -1.0],
    "scale subnormal": [1.4 * 127 * 2.0**-24, 1e-6, -1e-7, 0.0],
    "scale of the smallest": [127 * 2.0**-24, 3e-8, -1e-6, 1e-6],
    "scale to zero": [127 * 2.0**-26, -1e-6, 0.0, 1e-9],
    "subnormal input": [1e-40, -1e-45, 0.0, 1e-42],
    "fp32 extremes": [3.4e38, -3.4e38, 1.0, 0.0],
    "nan": [1.0, math.nan, 2.0, 3.0],
    "infinity": [1.0, math.inf, 2.0, 3.0],
    "minus infinity and nan": [-math.inf, math.nan, 2.0, 3.0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_awkward_vectors_follow_the_formula(name: str, dtype: torch.dtype) -> None:
    vector = torch.tensor(VECTORS[name])
    elements, scale = quantise(vector, dtype)
    expected, plain_scale = plain_quantise(vector.tolist(), dtype)
    assert element_bytes(elements) == expected
    if math.isnan(plain_scale):
        assert scale.view(torch.int16).item() == 0x7E00, "one NaN, whatever was wrong"
        assert dequantise(elements, scale).isnan().all(), "not finite, and stays so"
    else:
        assert scale.item() == plain_scale
        assert dequantise(elements, scale).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_vectors_of_every_size_follow_the_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, 24, generator=generator) * 10 ** (torch.rand(300, 1, generator=generator) * 12 - 7)
    elements, scales = quantise(x, dtype)
    for row in range(300):
        expected, scale = plain_quantise(x[row].tolist(), dtype)
        assert element_bytes(elements[row]) == expected
        assert scales[row].item() == scale


def test_every_tie_of_fp8_goes_to_the_even_code() -> None:
    ties = [(a + b) / 2 for a, b in itertools.pairwise(E4M3)]
    for tie in ties:
        elements, scale = quantise(torch.tensor([448.0, tie, -tie, math.nextafter(tie, 0)]), torch.float8_e4m3fn)
        assert scale.item() == 1
        assert element_bytes(elements)[1:3] == [nearest_e4m3(tie), nearest_e4m3(-tie)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.502 / 127), (torch.float8_e4m3fn, 0.0365)], ids=str)
def test_a_round_trip_errs_by_half_a_step_of_the_vectors_largest(dtype: torch.dtype, bound: float) -> None:
    """int8: half of 1/127 of the largest, and what rounding the scale to fp16 adds. fp8: half of a step of its top binade."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(6)) * torch.logspace(-2, 4, 1000)[:, None]
    back = dequantise(*quantise(x, dtype))
    assert ((back - x).abs().amax(-1) / x.abs().amax(-1)).max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_quantised_quantises_to_itself(dtype: torch.dtype) -> None:
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(7))
    elements, scales = quantise(x, dtype)
    again, same = quantise(dequantise(elements, scales), dtype)
    assert torch.equal(scales, same)
    assert element_bytes(again.flatten()) == element_bytes(elements.flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_and_input_dtypes(dtype: torch.dtype, wide: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(wide)
    elements, scales = quantise(x, dtype)
    assert (elements.shape, elements.dtype, scales.shape, scales.dtype) == (x.shape, dtype, x.shape[:3], torch.float16)
    assert torch.equal(dequantise(elements, scales), dequantise(*quantise(x.float(), dtype)))


# -- the transform of keys and queries

RUNS = {1: 1, 2: 2, 7: 1, 24: 8, 36: 4, 64: 64, 80: 16, 96: 32, 128: 128, 2048: 2048}  # head_dim: elements that are mixed


def butterflies(vector: list[float], size: int) -> list[float]:
    """The transform of each run of `size`, one addition at a time, each rounded to single precision: strides 1, 2, 4, ..."""
    x = list(vector)
    stride = 1
    while stride < size:
        for i in range(len(x)):
            if not i & stride:
                x[i], x[i + stride] = fp32(x[i] + x[i + stride]), fp32(x[i] - x[i + stride])
        stride *= 2
    return [fp32(a * fp32(1 / math.sqrt(size))) for a in x]


@pytest.mark.parametrize("head_dim", RUNS)
def test_the_transform_is_made_of_butterflies_in_a_fixed_order(head_dim: int) -> None:
    """To the bit: what a cache holds must not depend on who wrote it."""
    x = torch.randn(3, head_dim, generator=torch.Generator().manual_seed(8)) * 10
    assert hadamard(x).tolist() == [butterflies(row, RUNS[head_dim]) for row in x.tolist()]


@pytest.mark.parametrize("head_dim", RUNS)
def test_the_transform_undoes_itself_and_keeps_products(head_dim: int) -> None:
    q, k = (torch.randn(50, head_dim, generator=torch.Generator().manual_seed(seed)) for seed in (9, 10))
    before = k.clone()
    torch.testing.assert_close(hadamard(hadamard(k)), k, rtol=1e-6, atol=1e-5)
    assert torch.equal(k, before) and hadamard(k).is_contiguous()
    torch.testing.assert_close((hadamard(q) * hadamard(k)).sum(-1), (q * k).sum(-1), rtol=1e-5, atol=1e-4)
    if RUNS[head_dim] == 1:
        assert torch.equal(hadamard(k), k)


@pytest.mark.parametrize("head_dim", RUNS)
def test_one_outlier_is_spread_over_its_whole_run(head_dim: int) -> None:
    run = RUNS[head_dim]
    x = torch.zeros(head_dim)
    x[head_dim - 1] = 8.0
    assert hadamard(x)[-run:].abs().unique().tolist() == [fp32(8 * fp32(1 / math.sqrt(run)))]
    assert not hadamard(x)[:-run].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_before_the_transform_is_not_finite_after_it(bad: float) -> None:
    """3e38: neither is a vector whose sums leave single precision."""
    x = torch.ones(2, 24)
    x[0, 8:10] = bad
    elements, scales = quantise(hadamard(x), torch.int8)
    assert scales.isnan().tolist() == [True, False]
    assert not elements[0].any()
