"""Quantised matrices that are held in the bits they are stored in: which ones can be, what they take, and the way there.

Which ones, headers alone say: so memory is known before anything is read. Scales of blocks are repeated for each of their rows, so that
rows share nothing. What only the tensors can say is decided later, for plain numbers: groups of unequal size, numbers that are not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.engine.formats.scales import Scales
from splitfire.engine.formats.stored import StoredMatrix
from splitfire.engine.kernels.linear import GroupedMatrix, int4_eighth, pack_int4

SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LEAST_GROUP = 16  # columns that tensor cores take at once
ZEROS = ("qzeros", "weight_zero_point")
ZERO_BYTES, ORDER_BYTES = 2, 8  # of bf16 and int64


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is held, as a GroupedMatrix. Matrices of equal forms can be fused."""

    dtype: torch.dtype  # of elements: int8, float8_e4m3fn, or int32 for words of 4 bits
    group_size: int
    scales: torch.dtype
    has_zeros: bool
    has_order: bool

    def num_bytes(self, num_rows: int, num_columns: int) -> int:
        """Without the order, which fused matrices share; with zero points, which are left out when all are 0."""
        num_groups = -(-num_columns // self.group_size)
        element_bytes = num_columns // 2 if self.dtype == torch.int32 else num_columns
        return num_rows * (element_bytes + num_groups * (self.scales.itemsize + ZERO_BYTES * self.has_zeros))


def form_of(matrix: StoredMatrix) -> Form | None:
    """None: plain, or in groups that do not suit a kernel."""
    scheme = matrix.scheme
    if scheme is None:
        return None
    group_size = min(scheme.grid.columns or matrix.columns, matrix.columns)
    is_int4 = scheme.bits == 4 and scheme.layout != "int8"
    if is_int4 and int4_eighth(matrix.columns, group_size) < LEAST_GROUP:
        return None
    if group_size < matrix.columns and group_size % LEAST_GROUP:
        return None
    dtype = torch.float8_e4m3fn if scheme.layout == "fp8" else torch.int32 if is_int4 else torch.int8
    scales = SCALE_DTYPES[matrix.parts[scheme.scale_name].dtype]
    return Form(dtype, group_size, scales, any(part in matrix.parts for part in ZEROS), scheme.is_reordered)


def hold(form: Form, matrix: StoredMatrix, scales: Scales, device: torch.device) -> GroupedMatrix | None:
    """Room for its elements, and what they share. None when its groups are not of equal size."""
    order = None
    if scales.order is not None:
        order = scales.order.argsort(stable=True)
        if not torch.equal(scales.order[order], torch.arange(matrix.columns) // form.group_size):
            return None
        if not form.has_order and torch.equal(order, torch.arange(matrix.columns)):
            order = None
    width = matrix.columns // 8 if form.dtype == torch.int32 else matrix.columns
    zeros = None if scales.zeros is None else scales.zeros - unsigned_middle(matrix)
    return GroupedMatrix(
        torch.empty(matrix.rows, width, dtype=form.dtype, device=device),
        _for_each_row(scales, scales.factors, matrix.rows).to(device, form.scales),
        None if zeros is None or not bool(zeros.any()) else _for_each_row(scales, zeros, matrix.rows).to(device, torch.bfloat16),
        form.group_size, None if order is None else order.to(device),
    )  # fmt: skip


def _for_each_row(scales: Scales, values: Tensor, num_rows: int) -> Tensor:
    return scales.of_rows(values, 0, num_rows).expand(num_rows, -1).contiguous()


def held_elements(tile: Tensor, into: GroupedMatrix, middle: int) -> Tensor:
    """tile [n, in] as QuantisedRows has it -> as `into` holds it."""
    if middle:
        tile = (tile.to(torch.int16) - middle).to(torch.int8)
    if into.order is not None:
        tile = tile.view(torch.uint8)[:, into.order.cpu()].view(tile.dtype)
    return pack_int4(tile, into.eighth) if into.is_int4 else tile


def unsigned_middle(matrix: StoredMatrix) -> int:
    """AWQ and GPTQ count from 0 on, elements here are around 0: what lies between, of elements and zero points."""
    assert matrix.scheme is not None
    return 1 << (matrix.scheme.bits - 1) if matrix.scheme.layout in ("awq", "gptq") else 0
