"""compressed-tensors' integers: `int-quantized`, an int8 an element, and `pack-quantized`, 4 or 8 bits of an int32.

Packed elements run along a row, lowest bits first, and are stored plus half their range, so that they are positive. Zero points are
packed likewise, but along the rows: [out * bits / 32, groups].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from splitfire.core.quant_config import Scheme
from splitfire.engine.formats.scales import QuantisedRows, Scales, read_order, unpack_words
from splitfire.engine.formats.stored import Part, StoredMatrix, scale_part


def int8_parts(scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
    """Zero points of symmetric matrices are stored by some; they are used like any other."""
    return {
        "weight": Part(((rows, columns),), ("I8",)),
        "weight_scale": scale_part(scheme.grid, rows, columns),
        "weight_zero_point": scale_part(scheme.grid, rows, columns, ("I8",), scheme.has_zeros),
    }


def open_int8_rows(matrix: StoredMatrix, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantisedRows:
    weight, zeros = tensors["weight"], tensors.get("weight_zero_point")
    grid = scheme.grid.shape(matrix.rows, matrix.columns)
    if zeros is not None and not bool(zeros.any()):
        zeros = None
    factors = tensors["weight_scale"].float().view(grid)
    scales = Scales(scheme.grid, factors, None if zeros is None else zeros.float().view(grid))
    return QuantisedRows((matrix.rows, matrix.columns), lambda begin, end: weight[begin:end], scales)


def packed_parts(scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
    per_word = 32 // scheme.bits
    found = {
        "weight_packed": Part(((rows, -(-columns // per_word)),), ("I32",)),
        "weight_scale": scale_part(scheme.grid, rows, columns),
        "weight_shape": Part(((2,),), ("I64", "I32"), is_required=False),
        "weight_g_idx": Part(((columns,),), ("I32", "I64"), scheme.is_reordered),
    }
    if scheme.has_zeros:
        found["weight_zero_point"] = Part(((-(-rows // per_word), scheme.grid.shape(rows, columns)[1]),), ("I32",))
    return found


def open_packed_rows(matrix: StoredMatrix, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantisedRows:
    shape = (matrix.rows, matrix.columns)
    said = tensors.get("weight_shape")
    if said is not None and tuple(said.tolist()) != shape:
        raise matrix.fail("weight_shape", f"is {said.tolist()}, config.json asks for {list(shape)}")
    words = tensors["weight_packed"]

    def elements(begin: int, end: int) -> Tensor:
        return _signed(unpack_words(words[begin:end], scheme.bits)[:, : matrix.columns], scheme.bits)

    grid = scheme.grid.shape(*shape)
    packed_zeros, index = tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
    zeros = None
    if packed_zeros is not None:
        zeros = _signed(unpack_words(packed_zeros.t(), scheme.bits).t()[: matrix.rows], scheme.bits).float()
    order = None
    if index is not None and not bool((index == -1).all()):  # -1: never filled in, columns are as they come
        order = read_order(matrix, "weight_g_idx", index, grid[1])
    return QuantisedRows(shape, elements, Scales(scheme.grid, tensors["weight_scale"].float().view(grid), zeros, order))


def _signed(stored: Tensor, bits: int) -> Tensor:
    return (stored.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
