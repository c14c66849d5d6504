"""From elements to numbers: (element - zero point) * scale, in fp32, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.core.quant_config import Grid
from splitfire.engine.formats.stored import StoredMatrix
from splitfire.engine.kernels.linear import Int8Matrix, row_tiles


@dataclass(frozen=True, slots=True)
class Scales:
    """Of one matrix [out, in]; what a block of `grid` shares."""

    grid: Grid
    factors: Tensor  # [blocks of rows, blocks of columns] fp32
    zeros: Tensor | None = None  # likewise
    order: Tensor | None = None  # [in] int64: the block of each column; None: as they come

    def apply(self, elements: Tensor, begin: int) -> Tensor:
        """elements [n, in] fp32 of the rows from `begin` on, changed in place -> the numbers they stand for."""
        if self.zeros is not None:
            elements -= self._spread(self.zeros, begin, elements)
        elements *= self._spread(self.factors, begin, elements)
        return elements

    def _spread(self, values: Tensor, begin: int, elements: Tensor) -> Tensor:
        """What the elements have of `values`, in a shape that broadcasts over them."""
        num_rows, num_columns = elements.shape
        values = self.of_rows(values, begin, num_rows)
        if self.order is not None:
            return values[:, self.order]
        if values.shape[1] > 1:
            assert self.grid.columns is not None
            values = values.repeat_interleave(self.grid.columns, 1)[:, :num_columns]
        return values

    def of_rows(self, values: Tensor, begin: int, num_rows: int) -> Tensor:
        """values [blocks of rows, blocks of columns] -> [num_rows, blocks of columns]; [1, ...] where all rows share them."""
        if values.shape[0] == 1:
            return values
        assert self.grid.rows is not None
        return values[torch.arange(begin, begin + num_rows) // self.grid.rows]


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """A matrix that can be read a few rows at a time."""

    shape: tuple[int, int]  # [out, in]
    elements: Callable[[int, int], Tensor]  # rows begin .. end -> [n, in], of an integer dtype or fp8
    scales: Scales

    def dequantise(self, begin: int, end: int) -> Tensor:
        """Rows begin .. end as fp32."""
        return self.scales.apply(self.elements(begin, end).float(), begin)

    def as_int8(self) -> Int8Matrix | None:
        """The same numbers without another rounding, where elements are int8 and each row has one scale."""
        num_rows, num_columns = self.shape
        has_row_scales = self.scales.factors.shape[1] == 1 and self.scales.grid.rows in (1, None)
        if not has_row_scales or self.scales.zeros is not None or self.elements(0, 1).dtype != torch.int8:
            return None
        elements = torch.empty(num_rows, num_columns, dtype=torch.int8)
        for begin, end in row_tiles(self.shape):
            elements[begin:end] = self.elements(begin, end)
        return Int8Matrix(elements, self.scales.factors[:, 0].expand(num_rows).contiguous())


def read_order(matrix: StoredMatrix, part: str, index: Tensor, num_groups: int) -> Tensor:
    """index [in] of integers -> int64, each the number of a group."""
    order = index.to(torch.int64)
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= num_groups:
        raise matrix.fail(part, f"names the groups {low} to {high}, accepted: 0 to {num_groups - 1}")
    return order


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """words [..., n] int32 -> [..., n * 32 / bits] uint8: the numbers of 4 or 8 bits in each, lowest first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)
