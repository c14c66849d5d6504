"""`linear` and `embed`: products with, and rows of, a model's matrices, plain or of few bits. Torch; any device, any thread.

`Int8Matrix` is made here, with one fp32 scale for each output channel, that is for each row:

    scale = absmax of the row / 127
    element = round(x / scale)         half to even

Its elements are exact in bf16 and fp32, so a product is taken with them as they are and scaled afterwards, in fp32. A row of zeros
has the scale zero. A row with a NaN or an infinity in it has the scale NaN and elements of zero: its products are NaN, never numbers
that look right. `GroupedMatrix` is what a quantised checkpoint stores, in as many bits; here it is widened a tile at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127.0
TILE_ELEMENTS = 1 << 20  # converted at a time: a matrix of few bits never stands beside a wide copy of itself
LONGEST_EIGHTH = 32


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """[out, in]: a row times its scale is what the model means. `quantise_rows` writes -127 .. 127, a checkpoint may hold -128."""

    elements: Tensor  # [out, in] int8
    scales: Tensor  # [out] fp32


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """[out, in]: (element - zero point) * scale is what the model means. `group_size` columns share them; rows share nothing, so that
    matrices can be put below each other and cut between rows, and between columns at multiples of group_size and of 8 * eighth."""

    elements: Tensor  # [out, in] int8 or float8_e4m3fn, or [out, in / 8] int32: numbers of 4 bits (pack_int4)
    scales: Tensor  # [out, groups] bf16, fp16 or fp32
    zeros: Tensor | None  # [out, groups] bf16, integers of -128 .. 127; None: none but 0
    group_size: int
    order: Tensor | None = None  # [in] int64: column j here is column order[j] of the model; None: as they come

    @property
    def is_int4(self) -> bool:
        return self.elements.dtype == torch.int32

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.elements.shape
        return rows, width * 8 if self.is_int4 else width

    @property
    def eighth(self) -> int:
        return int4_eighth(self.shape[1], self.group_size)


Matrix = Tensor | Int8Matrix | GroupedMatrix  # [out, in]


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out], dtype of x."""
    if isinstance(matrix, Tensor):
        return functional.linear(x, matrix, bias)
    if isinstance(matrix, GroupedMatrix):
        tiles = [slice(begin, end) for begin, end in row_tiles(matrix.shape)]
        biases = [None if bias is None else bias[rows] for rows in tiles]
        parts = [functional.linear(x, dequantise(matrix, r).to(x.dtype), b) for r, b in zip(tiles, biases, strict=True)]
        return torch.cat(parts, -1)
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # fp16 ends at 65504, which sums of 127 x reach
    x_wide = x.to(wide)
    num_rows = matrix.elements.shape[0]
    result = torch.empty(*x.shape[:-1], num_rows, dtype=x.dtype, device=x.device)
    for begin, end in row_tiles(matrix.elements.shape):
        products = functional.linear(x_wide, matrix.elements[begin:end].to(wide)).float() * matrix.scales[begin:end]
        if bias is not None:
            products += bias[begin:end]
        result[..., begin:end] = products
    return result


def embed(token_ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """token_ids [num_tokens] int64 -> their rows [num_tokens, in] in `dtype`, which a plain matrix has already."""
    if isinstance(matrix, Tensor):
        return functional.embedding(token_ids, matrix)
    if isinstance(matrix, GroupedMatrix):
        return dequantise(matrix, token_ids).to(dtype)
    return (matrix.elements[token_ids].float() * matrix.scales[token_ids, None]).to(dtype)


def quantise_rows(rows: Tensor) -> Int8Matrix:
    """rows [out, in] of any float dtype."""
    wide = rows.float()
    scales = wide.abs().amax(-1) / LARGEST
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    divisors = scales[:, None]
    ratios = torch.where(divisors > 0, wide / divisors, 0.0).round_().clamp_(-LARGEST, LARGEST)
    return Int8Matrix(ratios.to(torch.int8), scales)


def dequantise(matrix: GroupedMatrix, rows: slice | Tensor) -> Tensor:
    """Some rows as fp32 [n, in], columns in the model's order."""
    elements, num_columns = matrix.elements, matrix.shape[1]
    picked = elements.view(torch.uint8)[rows].view(elements.dtype)  # not every device can index fp8
    numbers = (unpack_int4(picked, matrix.eighth) if matrix.is_int4 else picked).float()
    for values, apply in ((matrix.zeros, numbers.sub_), (matrix.scales, numbers.mul_)):
        if values is not None:
            apply(values[rows].float().repeat_interleave(matrix.group_size, -1)[..., :num_columns])
    if matrix.order is None:
        return numbers
    ordered = torch.empty_like(numbers)
    ordered[..., matrix.order] = numbers
    return ordered


def int4_eighth(num_columns: int, group_size: int) -> int:
    """Neighbouring columns that are packed alike: a power of two that divides groups; less than 16 when these do not suit a kernel."""
    whole = math.gcd(group_size, num_columns // 8)
    return min(LONGEST_EIGHTH, whole & -whole) if num_columns % 8 == 0 else 1


def pack_int4(elements: Tensor, eighth: int) -> Tensor:
    """elements [n, in] int8 of -8 .. 7 -> [n, in / 8] int32. Eighths of 8 * eighth columns lie over each other in `eighth` words, plus 8,
    from the lowest bits up those of number 0, 2, 4, 6, 1, 3, 5, 7: so a tile of words is eight tiles of neighbouring columns, and two of
    these take one mask and one shift, as numbers in the halves of a word."""
    columns = (elements + 8).to(torch.int32).unflatten(-1, (-1, 8, eighth))
    words = torch.zeros_like(columns[..., 0, :])
    for number in range(8):
        words |= columns[..., number, :] << int4_shift(number)
    return words.flatten(-2)


def unpack_int4(words: Tensor, eighth: int) -> Tensor:
    """The way back: [n, in / 8] int32 -> [n, in] int8."""
    spans = words.unflatten(-1, (-1, eighth))
    columns = [(spans >> int4_shift(number)) & 15 for number in range(8)]
    return torch.stack(columns, -2).flatten(-3).to(torch.int8) - 8


def int4_shift(number: int) -> int:
    return 4 * (number // 2) + 16 * (number % 2)


def fuse_rows(matrices: Sequence[Matrix], dtype: torch.dtype) -> Matrix:
    """One matrix of all their rows, equally wide; where they are not of one form (mixed precision), a plain one of `dtype`."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if isinstance(first, Int8Matrix):
        int8 = [matrix for matrix in matrices if isinstance(matrix, Int8Matrix)]
        assert len(int8) == len(matrices)
        return Int8Matrix(torch.cat([m.elements for m in int8]), torch.cat([m.scales for m in int8]))
    grouped = [matrix for matrix in matrices if isinstance(matrix, GroupedMatrix)]
    if isinstance(first, Tensor) or len(grouped) < len(matrices) or not all(_are_alike(first, matrix) for matrix in grouped):
        return torch.cat([_widened(matrix, dtype) for matrix in matrices])
    zeros = None
    if any(matrix.zeros is not None for matrix in grouped):
        zeros = torch.cat([_zeros(matrix) for matrix in grouped])
    return GroupedMatrix(
        torch.cat([m.elements.view(torch.uint8) for m in grouped]).view(first.elements.dtype),
        torch.cat([m.scales for m in grouped]), zeros, first.group_size, first.order,
    )  # fmt: skip


def row_tiles(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges that cover the rows of [out, in]: TILE_ELEMENTS each, in multiples of 64 rows."""
    num_rows, num_columns = shape
    step = max(64, TILE_ELEMENTS // max(1, num_columns) // 64 * 64)
    return [(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]


def _are_alike(a: GroupedMatrix, b: GroupedMatrix) -> bool:
    def form(matrix: GroupedMatrix) -> tuple[object, ...]:
        return matrix.elements.dtype, matrix.scales.dtype, matrix.group_size, matrix.order is None

    return form(a) == form(b) and (a.order is None or b.order is None or torch.equal(a.order, b.order))


def _zeros(matrix: GroupedMatrix) -> Tensor:
    return torch.zeros_like(matrix.scales, dtype=torch.bfloat16) if matrix.zeros is None else matrix.zeros


def _widened(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix
    assert isinstance(matrix, GroupedMatrix)
    wide = torch.empty(matrix.shape, dtype=dtype, device=matrix.elements.device)
    for begin, end in row_tiles(matrix.shape):
        wide[begin:end] = dequantise(matrix, slice(begin, end))
    return wide
