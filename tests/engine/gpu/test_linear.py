"""Products with matrices of few bits against fp32 ones with the numbers they stand for, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from splitfire.engine.kernels.gpu.linear import E4M3, INT4, PLACES, linear, tiling, widened
from splitfire.engine.kernels.linear import GroupedMatrix, Int8Matrix, dequantise, int4_eighth, pack_int4, quantise_rows

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Case:
    """A matrix, as a checkpoint may store it."""

    kind: str
    columns: int
    inputs: int
    group_size: int
    has_zeros: bool = False
    scales: torch.dtype = torch.float16

    def matrix(self) -> GroupedMatrix:
        torch.manual_seed(self.inputs)
        shape, groups = (self.columns, self.inputs), -(-self.inputs // self.group_size)
        if self.kind == "e4m3":
            elements = (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            elements[0, : min(16, self.inputs)] = torch.tensor([2.0**-9, -(2.0**-9), -0.0, 448.0] * 4)[: self.inputs]
        else:
            largest = 8 if self.kind == "int4" else 128
            elements = torch.randint(-largest, largest, shape, dtype=torch.int8)
            if self.kind == "int4":
                elements = pack_int4(elements, int4_eighth(self.inputs, self.group_size))
        zeros = torch.randint(-8 if self.kind == "int4" else -128, 8, (self.columns, groups)).bfloat16() if self.has_zeros else None
        return GroupedMatrix(elements, (torch.rand(self.columns, groups) * 0.01).to(self.scales), zeros, self.group_size)


CASES = [
    Case("int8", 33, 300, 300, scales=torch.float32),
    Case("int8", 1, 17, 17, has_zeros=True),
    Case("int8", 40, 160, 32, has_zeros=True),
    Case("e4m3", 33, 200, 200),
    Case("e4m3", 40, 200, 128, scales=torch.bfloat16),  # a block that is cut short
    Case("int4", 33, 512, 128, has_zeros=True),
    Case("int4", 40, 256, 256),
    Case("int4", 9, 256, 64, has_zeros=True, scales=torch.bfloat16),
    Case("int4", 5, 128, 16),
    Case("int4", 5, 768, 96, has_zeros=True),  # which is no power of two
]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *size: Any, **how: Any) -> Tensor:
        made = new_empty(x, *size, **how)
        return made.fill_(torch.nan) if made.is_floating_point() and made.dtype.itemsize > 1 else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def compare(x: Tensor, matrix: GroupedMatrix, bias: Tensor | None = None) -> None:
    """At most twice as far from fp32 as plain torch with these numbers in the dtype of x."""
    numbers, wide_bias = dequantise(matrix, ALL), None if bias is None else bias.float()
    exact = functional.linear(x.float(), numbers, wide_bias)
    plain = functional.linear(x, numbers.to(x.dtype), bias).float()
    got = linear(x, matrix, bias)
    assert got.dtype == x.dtype and got.shape == exact.shape
    error, allowed = (got.float() - exact).norm(), (plain - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), (float(error), float(allowed))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (17, torch.float16), (33, torch.float32)], ids=str)
def test_a_product_is_that_of_the_numbers(rows: int, dtype: torch.dtype, case: Case) -> None:
    compare(torch.randn(rows, case.inputs).to(dtype), case.matrix(), torch.randn(case.columns).to(dtype) if rows > 1 else None)


@pytest.mark.parametrize("case", [Case("int8", 20, 2000, 2000), Case("int4", 3, 2048, 128, has_zeros=True)], ids=str)
def test_parts_of_the_inputs_are_added_up(case: Case) -> None:
    matrix = case.matrix()
    how = tiling(3, matrix, torch.float16)
    assert how.num_parts == 2 and (how.num_parts - 1) * how.part_inputs < case.inputs <= how.num_parts * how.part_inputs
    compare(torch.randn(3, case.inputs).half(), matrix, torch.randn(case.columns).half())


@pytest.mark.parametrize(("columns", "inputs"), [(1024, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (128256, 4096)])
@pytest.mark.parametrize("rows", [1, 32])
def test_every_multiprocessor_gets_a_program(rows: int, columns: int, inputs: int) -> None:
    elements = torch.empty(columns, inputs, dtype=torch.int8, device="meta")
    how = tiling(rows, GroupedMatrix(elements, torch.empty(columns, 1, device="meta"), None, inputs), torch.bfloat16)
    assert -(-columns // how.tile.columns) * how.num_parts >= (128 if rows == 1 else 64)


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_int8_made_here_and_plain_matrices_are_read_too(rows: int) -> None:
    matrix, x = quantise_rows(torch.randn(33, 48)), torch.randn(rows, 48)
    numbers = matrix.elements * matrix.scales[:, None]
    for held in (matrix, numbers):
        torch.testing.assert_close(linear(x, held), functional.linear(x, numbers), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, who computes for the interpreter
def test_fp16_sums_do_not_overflow_and_no_row_knows_of_another() -> None:
    matrix = Int8Matrix(torch.full((2, 1024), 127, dtype=torch.int8), torch.tensor([1e-3, torch.nan]))
    x = torch.ones(3, 1024).half()
    x[1, 5] = torch.inf
    got = linear(x, matrix)
    assert got[:, 0].tolist() == [130.0, torch.inf, 130.0] and got[:, 1].isnan().all()


@pytest.mark.parametrize("rows", [2, 40])
def test_columns_in_an_order_of_their_own_meet_their_inputs(rows: int) -> None:
    plain = Case("int4", 9, 256, 64, has_zeros=True).matrix()
    matrix = GroupedMatrix(plain.elements, plain.scales, plain.zeros, 64, torch.randperm(256))
    compare(torch.randn(rows, 256), matrix)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_widened_rows_are_what_plain_weights_would_be(case: Case) -> None:
    matrix = case.matrix()
    for dtype in (torch.float32, torch.float16):
        tile = torch.full((case.columns + 1, case.inputs), 77.0, dtype=dtype)
        assert torch.equal(widened(matrix, tile), dequantise(matrix, ALL).to(dtype)) and (tile[-1] == 77).all()


def test_a_matrix_of_several_tiles_is_widened_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfire.engine.kernels.gpu.linear.TILE_ELEMENTS", 1)
    case = Case("int4", 130, 128, 128, has_zeros=True)
    compare(torch.randn(33, 128), case.matrix(), torch.randn(130))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_that_are_put_in_their_places_are_the_number(dtype: torch.dtype) -> None:
    """The interpreter cannot compute in bf16; these are the steps of `_numbers`, for every number there is."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    shift, factor = PLACES[E4M3][dtype]
    bits = (every.view(torch.int8).to(torch.int16) << shift) & ((0x7F << shift) - 0x8000)
    is_number = ~every.float().isnan()
    assert torch.equal((bits.view(dtype) * factor).float()[is_number], every.float()[is_number])
    place, offset = PLACES[INT4][dtype]
    low = torch.arange(16, dtype=torch.int16) | (int(place) & 0xFFFF)
    assert place >> 16 == place & 0xFFFF and (low.view(dtype) - offset).tolist() == list(range(16))
    zero_points = torch.arange(-8, 8).to(dtype) + (offset + 8)
    assert torch.equal(low.view(dtype)[:, None] - zero_points, torch.arange(16)[:, None].to(dtype) - torch.arange(16).to(dtype))
