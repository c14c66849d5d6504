"""Matrices of few bits: the rounding, rows that no scale can hold, and products that equal those of the numbers they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from splitfire.engine.kernels.linear import (
    GroupedMatrix,
    Int8Matrix,
    Matrix,
    dequantise,
    embed,
    fuse_rows,
    int4_eighth,
    linear,
    pack_int4,
    quantise_rows,
    row_tiles,
    unpack_int4,
)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 2, rows)[:, None]


def numbers(matrix: Int8Matrix) -> Tensor:
    return matrix.elements.float() * matrix.scales[:, None]


def test_halves_round_to_even_and_the_largest_is_127() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -254.0]])
    made = quantise_rows(rows)
    assert made.scales.tolist() == [1.0, 2.0]
    assert made.elements.tolist() == [[127, 0, 2, 2, 0, -2, -127], [0, 0, 0, 0, 0, 0, -127]]


@pytest.mark.parametrize("columns", [1, 3, 64, 577])
def test_no_element_is_further_from_its_number_than_half_a_step(columns: int) -> None:
    rows = random_matrix(65, columns)
    made = quantise_rows(rows)
    assert made.elements.dtype == torch.int8 and made.scales.dtype == torch.float32
    assert bool(((numbers(made) - rows).abs() <= made.scales[:, None] * 0.500001).all())
    assert int(made.elements.abs().amax(1).min()) == 127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_never_looks_right(value: float) -> None:
    rows = random_matrix(3, 8)
    rows[1, 5] = value
    made = quantise_rows(rows)
    assert bool(made.scales[1].isnan()) and not made.elements[1].any()
    out = linear(torch.ones(2, 8), made)
    assert out.isnan().tolist() == [[False, True, False]] * 2


def test_rows_of_zeros_and_of_next_to_nothing_are_zero() -> None:
    made = quantise_rows(torch.tensor([[0.0, -0.0], [1e-45, -1e-45]]))
    assert made.elements.tolist() == [[0, 0], [0, 0]] and not numbers(made).any()


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_numbers(rows: int, dtype: torch.dtype) -> None:
    """Also over more than one tile; twice as far from fp32 as a plain product of this dtype is allowed, and no further."""
    made, x = quantise_rows(random_matrix(rows, 96)), random_matrix(5, 96, seed=1)
    bias = torch.arange(rows).to(dtype)
    exact = functional.linear(x.to(dtype).float(), numbers(made), bias.float())
    plain = functional.linear(x.to(dtype), numbers(made).to(dtype), bias)
    ours = linear(x.to(dtype), made, bias)
    assert ours.dtype == dtype and ours.shape == (5, rows)
    error, allowed = (ours.float() - exact).abs().mean(), (plain.float() - exact).abs().mean()
    assert error <= 2 * allowed + 1e-6 * exact.abs().mean()


def test_fp16_sums_do_not_overflow() -> None:
    made = quantise_rows(torch.full((1, 4096), 1e-3))
    out = linear(torch.full((1, 4096), 8.0, dtype=torch.float16), made)
    assert float(out) == pytest.approx(4096 * 8e-3, rel=2e-3)


def test_a_step_without_rows() -> None:
    assert linear(torch.zeros(0, 8), quantise_rows(random_matrix(3, 8))).shape == (0, 3)
    assert embed(torch.zeros(0, dtype=torch.int64), quantise_rows(random_matrix(3, 8)), torch.float32).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_rows_are_their_numbers(dtype: torch.dtype) -> None:
    made = quantise_rows(random_matrix(50, 24))
    ids = torch.tensor([0, 49, 7, 7])
    assert torch.equal(embed(ids, made, dtype), numbers(made)[ids].to(dtype))


def test_fused_rows_are_the_rows_of_each() -> None:
    parts = [random_matrix(rows, 16, seed=rows) for rows in (3, 1, 5)]
    whole = fuse_rows([quantise_rows(part) for part in parts], torch.float32)
    assert isinstance(whole, Int8Matrix)
    again = quantise_rows(torch.cat(parts))
    assert torch.equal(whole.elements, again.elements) and torch.equal(whole.scales, again.scales)


def four_bits(rows: int, columns: int = 256, group_size: int = 64, zeros: bool = True) -> tuple[GroupedMatrix, Tensor]:
    """And the numbers it stands for."""
    generator = torch.Generator().manual_seed(rows)
    elements = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    scales = torch.rand(rows, columns // group_size, generator=generator).half()
    points = torch.randint(-8, 8, scales.shape, generator=generator).bfloat16() if zeros else None
    wide = elements.float() - (0 if points is None else points.float().repeat_interleave(group_size, 1))
    packed = pack_int4(elements, int4_eighth(columns, group_size))
    return GroupedMatrix(packed, scales, points, group_size), wide * scales.float().repeat_interleave(group_size, 1)


@pytest.mark.parametrize(
    ("columns", "group", "eighth"), [(128, 128, 16), (256, 64, 32), (4096, 128, 32), (896, 128, 16), (256, 96, 32)]
)
def test_four_bits_come_back_from_where_they_were_put(columns: int, group: int, eighth: int) -> None:
    """Column 3 * eighth + 5 of a span: number 3 of word 5, in the bits from 4 * (3 // 2) + 16 on."""
    assert int4_eighth(columns, group) == eighth
    elements = torch.randint(-8, 8, (3, columns), dtype=torch.int8)
    words = pack_int4(elements, eighth)
    assert words.dtype == torch.int32 and words.nbytes * 2 == elements.nbytes
    assert torch.equal(unpack_int4(words, eighth), elements)
    assert torch.equal((words[:, 5] >> 20) & 15, elements[:, 3 * eighth + 5] + 8)


@pytest.mark.parametrize("columns", [100, 120, 4])
def test_columns_that_are_no_tiles_have_no_eighth(columns: int) -> None:
    assert int4_eighth(columns, columns) < 16


@pytest.mark.parametrize("rows", [1, 64, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_four_bits_are_those_of_plain_weights(rows: int, dtype: torch.dtype) -> None:
    matrix, wide = four_bits(rows)
    x, bias = random_matrix(5, 256, seed=1).to(dtype), torch.arange(rows).to(dtype)
    assert matrix.shape == wide.shape and torch.equal(dequantise(matrix, slice(None)), wide)
    torch.testing.assert_close(linear(x, matrix, bias), functional.linear(x, wide.to(dtype), bias), rtol=1e-5, atol=1e-4)
    ids = torch.tensor([rows - 1, 0, 0])
    assert torch.equal(embed(ids, matrix, dtype), wide[ids].to(dtype))


def test_columns_in_an_order_are_put_back() -> None:
    plain, wide = four_bits(3)
    order = torch.randperm(256)
    matrix = GroupedMatrix(plain.elements, plain.scales, plain.zeros, 64, order)
    assert torch.equal(dequantise(matrix, slice(None))[:, order], wide)


def test_fused_rows_of_one_form_keep_their_bits_and_others_become_plain() -> None:
    a, b, c, d = four_bits(3), four_bits(2, zeros=False), four_bits(5, group_size=128), four_bits(4)
    together = fuse_rows([a[0], b[0], d[0]], torch.float32)
    assert isinstance(together, GroupedMatrix) and together.shape == (9, 256)
    assert torch.equal(dequantise(together, slice(None)), torch.cat([a[1], b[1], d[1]]))
    ordered = GroupedMatrix(d[0].elements, d[0].scales, d[0].zeros, 64, torch.arange(256))
    others: list[tuple[Matrix, Tensor]] = [c, (c[1], c[1]), (ordered, d[1])]
    for other, wide in others:
        whole = fuse_rows([a[0], other], torch.float32)
        assert isinstance(whole, Tensor) and torch.equal(whole, torch.cat([a[1], wide]))


@given(rows=st.integers(0, 300_000), columns=st.integers(1, 100_000))
def test_tiles_cover_every_row_once(rows: int, columns: int) -> None:
    tiles = row_tiles((rows, columns))
    assert [begin for begin, _ in tiles] == [0, *(end for _, end in tiles)][: len(tiles)]
    assert (tiles[-1][1] if tiles else 0) == rows
    assert all(begin % 64 == 0 and begin < end for begin, end in tiles)
