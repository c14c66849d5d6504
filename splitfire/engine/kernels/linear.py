"""`linear` and `embed`: products with, and rows of, a model's matrices, plain or int8. Torch; any device, any thread.

An int8 matrix has one fp32 scale for each output channel, that is for each row:

    scale = absmax of the row / 127
    element = round(x / scale)         half to even

Its elements are exact in bf16 and fp32, so a product is taken with them as they are and scaled afterwards, in fp32. A row of zeros
has the scale zero. A row with a NaN or an infinity in it has the scale NaN and elements of zero: its products are NaN, never numbers
that look right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127.0
TILE_ELEMENTS = 1 << 20  # converted at a time: an int8 matrix never stands beside a wide copy of itself


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """[out, in]: a row times its scale is what the model means. `quantise_rows` writes -127 .. 127, a checkpoint may hold -128."""

    elements: Tensor  # [out, in] int8
    scales: Tensor  # [out] fp32


Matrix = Tensor | Int8Matrix  # [out, in]


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out], dtype of x."""
    if isinstance(matrix, Tensor):
        return functional.linear(x, matrix, bias)
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
    return (matrix.elements[token_ids].float() * matrix.scales[token_ids, None]).to(dtype)


def quantise_rows(rows: Tensor) -> Int8Matrix:
    """rows [out, in] of any float dtype."""
    wide = rows.float()
    scales = wide.abs().amax(-1) / LARGEST
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    divisors = scales[:, None]
    ratios = torch.where(divisors > 0, wide / divisors, 0.0).round_().clamp_(-LARGEST, LARGEST)
    return Int8Matrix(ratios.to(torch.int8), scales)


def fuse_rows(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of all their rows; they are all plain or all int8, and equally wide."""
    plain = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    int8 = [matrix for matrix in matrices if isinstance(matrix, Int8Matrix)]
    assert not plain or not int8
    if plain:
        return plain[0] if len(plain) == 1 else torch.cat(plain)
    if len(int8) == 1:
        return int8[0]
    return Int8Matrix(torch.cat([m.elements for m in int8]), torch.cat([m.scales for m in int8]))


def row_tiles(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges that cover the rows of [out, in]: TILE_ELEMENTS each, in multiples of 64 rows."""
    num_rows, num_columns = shape
    step = max(64, TILE_ELEMENTS // max(1, num_columns) // 64 * 64)
    return [(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]
