"""Parts of matrices of every form (kernels/linear.py), as copies: some of their rows, some of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from splitfire.engine.formats.held import LEAST_GROUP
from splitfire.engine.kernels.linear import (
    GroupedMatrix,
    Int8Matrix,
    Matrix,
    dequantise,
    int4_eighth,
    pack_int4,
    row_tiles,
    unpack_int4,
)


def rows(matrix: Matrix, parts: Sequence[range]) -> Matrix:
    """One matrix of these rows, in this order."""
    if isinstance(matrix, Tensor):
        return tensor_rows(matrix, parts)
    elements, scales = tensor_rows(matrix.elements, parts), tensor_rows(matrix.scales, parts)
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(elements, scales)
    zeros = None if matrix.zeros is None else tensor_rows(matrix.zeros, parts)
    return replace(matrix, elements=elements, scales=scales, zeros=zeros)


def tensor_rows(x: Tensor, parts: Sequence[range]) -> Tensor:
    """x [out, ...]"""
    return torch.cat([x[part.start : part.stop] for part in parts])


def columns(matrix: Matrix, part: range, dtype: torch.dtype) -> Matrix:
    """Rows keep their scales. A grouped matrix that cannot be cut there, because a group would be, or its columns are in another order,
    becomes a plain one of `dtype`."""
    if isinstance(matrix, Tensor):
        return _tensor_columns(matrix, part)
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(_tensor_columns(matrix.elements, part), matrix.scales.clone())
    cut = _grouped_columns(matrix, part)
    if cut is not None:
        return cut
    tiles = (dequantise(matrix, slice(begin, end))[:, part.start : part.stop] for begin, end in row_tiles(matrix.shape))
    return torch.cat([tile.to(dtype) for tile in tiles])


def moved(matrix: Matrix, device: torch.device) -> Matrix:
    """The matrix on this device; itself if it is there."""
    if isinstance(matrix, Tensor):
        return matrix.to(device)
    elements, scales = matrix.elements.to(device), matrix.scales.to(device)
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(elements, scales)
    zeros, order = (None if x is None else x.to(device) for x in (matrix.zeros, matrix.order))
    return replace(matrix, elements=elements, scales=scales, zeros=zeros, order=order)


def _grouped_columns(matrix: GroupedMatrix, part: range) -> GroupedMatrix | None:
    """None where it cannot be cut: in the middle of a group, or because columns are in another order or too few to be packed."""
    is_one = matrix.scales.shape[1] == 1  # a scale for each row serves any of its columns
    size = len(part) if is_one else matrix.group_size
    if matrix.order is not None or (not is_one and (part.start % size or part.stop % size)):
        return None
    if matrix.is_int4:
        eighth = int4_eighth(len(part), size)
        if eighth < LEAST_GROUP:
            return None
        elements = pack_int4(unpack_int4(matrix.elements, matrix.eighth)[:, part.start : part.stop], eighth)
    else:
        elements = _tensor_columns(matrix.elements, part)
    groups = range(1) if is_one else range(part.start // size, part.stop // size)
    zeros = None if matrix.zeros is None else _tensor_columns(matrix.zeros, groups)
    return GroupedMatrix(elements, _tensor_columns(matrix.scales, groups), zeros, size)


def _tensor_columns(x: Tensor, part: range) -> Tensor:
    return x[:, part.start : part.stop].clone(memory_format=torch.contiguous_format)
