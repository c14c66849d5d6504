"""`linear`: products with a model's matrices. Plain ones are cuBLAS's. An int8 one read by few rows is a kernel here, which reads half the
bytes of bf16 and takes the scale in on the way; for many rows ../linear.py widens it, tile by tile, for cuBLAS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels import linear as reference
from splitfire.engine.kernels.linear import Int8Matrix, Matrix

MOST_ROWS = 32
COLUMNS, STAGES = 32, 5
INPUTS = {16: 256, 32: 128}  # of a tile, by its rows; with 256 at 32 rows 56 bytes a thread spill on sm_90 (ptxas, 2026-11)


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [num_rows, in], contiguous -> [num_rows, out], dtype of x."""
    num_rows, num_inputs = x.shape
    if isinstance(matrix, Tensor) or num_rows > MOST_ROWS or x.dtype == torch.float16:
        return reference.linear(x, matrix, bias)
    assert isinstance(matrix, Int8Matrix)
    num_columns = matrix.elements.shape[0]
    out = x.new_empty(num_rows, num_columns)
    rows = 16 if num_rows <= 16 else 32
    if num_rows:
        _int8[triton.cdiv(num_columns, COLUMNS),](
            x, matrix.elements, matrix.scales, matrix.scales if bias is None else bias, out, num_rows, num_columns, num_inputs,
            rows, COLUMNS, min(INPUTS[rows], max(16, triton.next_power_of_2(num_inputs))), bias is not None,
            num_warps=4, num_stages=STAGES,
        )  # fmt: skip
    return out


@triton.jit
def _int8(
    x,  # [num_rows, num_inputs]
    elements,  # [num_columns, num_inputs] int8
    scales,  # [num_columns] fp32
    bias,  # [num_columns]
    out,  # [num_rows, num_columns]
    num_rows,
    num_columns,
    num_inputs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, num_inputs, INPUTS):
        i = begin + tl.arange(0, INPUTS)
        is_input = i < num_inputs
        factor = tl.load(x + row[:, None] * num_inputs + i[None, :], (row < num_rows)[:, None] & is_input[None, :], 0.0)
        at = column.to(tl.int64)[None, :] * num_inputs + i[:, None]
        weight = tl.load(elements + at, (column < num_columns)[None, :] & is_input[:, None], 0)
        sums = tl.dot(factor, weight.to(factor.dtype), sums, input_precision="ieee")
    is_column = column < num_columns
    sums *= tl.load(scales + column, is_column, 0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + column, is_column, 0.0).to(tl.float32)[None, :]
    to = out + row[:, None] * num_columns + column[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), (row < num_rows)[:, None] & is_column[None, :])
