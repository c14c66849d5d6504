"""`linear`: products with a model's matrices. Plain ones are cuBLAS's. Those of few bits are read as they are held by a kernel here when
rows are few, a half or a quarter of the bytes of bf16, scales and zero points taken in on the way; for many rows they are widened, tile
by tile, for cuBLAS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from splitfire.engine.kernels.gpu import chips
from splitfire.engine.kernels.linear import GroupedMatrix, Int8Matrix, Matrix

INT8, E4M3, INT4 = 1, 2, 3  # formats of elements
FORMATS = {torch.int8: INT8, torch.float8_e4m3fn: E4M3, torch.int32: INT4}
# Integer arithmetic puts numbers where a float has its bits: two of 4 bits into the last places of PLACE, which then stands for REST more;
# e4m3 PLACE bits further left, which then lacks a factor of REST.
PLACES: dict[int, dict[torch.dtype, tuple[int, float]]] = {
    INT8: dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), (0, 0)),
    E4M3: {torch.bfloat16: (4, 2.0**120), torch.float16: (7, 2.0**8), torch.float32: (7, 2.0**8)},
    INT4: {torch.bfloat16: (0x43004300, 128), torch.float16: (0x64006400, 1024), torch.float32: (0, 0)},
}
TILE_ELEMENTS = 1 << 25  # widened at a time: 64 MiB of bf16
WARPS = 1024
LEAST_TILES = 4  # of each part of the inputs


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program multiplies at a time."""

    rows: int
    columns: int
    inputs: int  # at most
    num_warps: int
    num_stages: int


# Counted in the code for sm_90 (2026-11), not timed yet: the loop over 16 rows takes 3.5 to 6.5 instructions a weight, most of them to make a
# bf16 of it, so that a multiprocessor wants eight warps (WARPS for all of an H200's): parts of the inputs make them where columns are few.
# More columns for 32 rows, because each program reads all of x. Two warps for 4 bits, whose 16 columns each spare a fifth of the
# instructions. Nothing spills, except 16 bytes a thread with fp32, which is multiplied in registers, without tensor cores.
FEW, MANY = Tile(16, 32, 256, 4, 5), Tile(32, 64, 128, 4, 5)
FEW_INT4, MANY_INT4_GFX942 = replace(FEW, num_warps=2), replace(MANY, num_stages=2)  # what fits there and does not spill
FEW_FP32, MANY_FP32 = Tile(16, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut up; by its shape alone, so that equal products have equal bits."""

    tile: Tile
    inputs: int  # of a tile
    part_inputs: int
    num_parts: int  # of the inputs: their sums are added by a second launch


def tiling(num_rows: int, matrix: GroupedMatrix, dtype: torch.dtype) -> Tiling:
    """`dtype` is that of the rows."""
    num_columns, num_inputs = matrix.shape
    if dtype == torch.float32:
        tile = FEW_FP32 if num_rows <= FEW.rows else MANY_FP32
    elif num_rows <= FEW.rows:
        tile = FEW_INT4 if matrix.is_int4 else FEW
    else:
        is_amd = chips.chip_of(matrix.elements.device) == "gfx942"
        tile = MANY_INT4_GFX942 if matrix.is_int4 and is_amd else MANY
    inputs = _tile_inputs(matrix, tile.inputs)
    num_tiles = triton.cdiv(num_inputs, inputs)
    wanted = triton.cdiv(WARPS, triton.cdiv(num_columns, tile.columns) * tile.num_warps)
    part_inputs = triton.cdiv(num_tiles, max(1, min(wanted, num_tiles // LEAST_TILES))) * inputs
    return Tiling(tile, inputs, part_inputs, triton.cdiv(num_inputs, part_inputs))


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [num_rows, in], contiguous -> [num_rows, out], dtype of x."""
    if isinstance(matrix, Tensor):
        return functional.linear(x, matrix, bias)
    if isinstance(matrix, Int8Matrix):
        matrix = GroupedMatrix(matrix.elements, matrix.scales[:, None], None, matrix.elements.shape[1])
    if matrix.order is not None:
        x = x[:, matrix.order]
    if x.shape[0] > MANY.rows:
        return _many_rows(x, matrix, bias)
    return _few_rows(x, matrix, bias)


def _few_rows(x: Tensor, matrix: GroupedMatrix, bias: Tensor | None) -> Tensor:
    num_rows, (num_columns, num_inputs) = x.shape[0], matrix.shape
    out = x.new_empty(num_rows, num_columns)
    if not num_rows:
        return out
    how = tiling(num_rows, matrix, x.dtype)
    tile, is_whole = how.tile, how.num_parts == 1
    sums = out if is_whole else x.new_empty(how.num_parts, num_rows, num_columns, dtype=torch.float32)
    form, is_grouped = FORMATS[matrix.elements.dtype], matrix.scales.shape[1] > 1
    _linear[triton.cdiv(num_columns, tile.columns), how.num_parts](
        x, _integers(matrix.elements), matrix.scales, _or(matrix.zeros, matrix.scales), _or(bias, out), sums,
        num_rows, num_columns, num_inputs, matrix.elements.shape[1], matrix.scales.shape[1], how.part_inputs,
        form, matrix.group_size if is_grouped else 0, matrix.zeros is not None, is_whole and bias is not None,
        tile.rows, tile.columns, how.inputs, math.gcd(how.inputs, matrix.group_size) if is_grouped else how.inputs,
        num_inputs % how.inputs == 0, *PLACES[form][x.dtype],
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if not is_whole:
        _join[triton.cdiv(out.numel(), 256),](
            sums, _or(bias, out), out, out.numel(), num_columns, how.num_parts, bias is not None, 256, num_warps=2
        )
    return out


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is there also where a kernel does not look."""
    return other if tensor is None else tensor


def _integers(elements: Tensor) -> Tensor:
    return elements.view(torch.int8) if elements.dtype == torch.float8_e4m3fn else elements


def _many_rows(x: Tensor, matrix: GroupedMatrix, bias: Tensor | None) -> Tensor:
    """Through tiles of plain rows, in the dtype of x."""
    num_columns, num_inputs = matrix.shape
    out = x.new_empty(x.shape[0], num_columns)
    step = max(64, TILE_ELEMENTS // num_inputs // 64 * 64)
    tile = x.new_empty(min(step, num_columns), num_inputs)
    for begin in range(0, num_columns, step):
        end = min(begin + step, num_columns)
        zeros = None if matrix.zeros is None else matrix.zeros[begin:end]
        plain = widened(GroupedMatrix(matrix.elements[begin:end], matrix.scales[begin:end], zeros, matrix.group_size), tile)
        if bias is None:
            torch.mm(x, plain.t(), out=out[:, begin:end])
        else:
            torch.addmm(bias[begin:end], x, plain.t(), out=out[:, begin:end])
    return out


def widened(matrix: GroupedMatrix, into: Tensor) -> Tensor:
    """Its rows as numbers of the dtype of `into` [at least as many rows, in], without any order of columns."""
    num_rows, num_inputs = matrix.shape
    inputs, form = _tile_inputs(matrix, 256), FORMATS[matrix.elements.dtype]
    _widen[triton.cdiv(num_inputs, inputs), triton.cdiv(num_rows, 32)](
        _integers(matrix.elements), matrix.scales, _or(matrix.zeros, matrix.scales), into, num_rows, num_inputs, matrix.group_size,
        form, matrix.zeros is not None, 32, inputs, *PLACES[form][torch.float32],
    )  # fmt: skip
    return into[:num_rows]


def _tile_inputs(matrix: GroupedMatrix, most: int) -> int:
    """Of one group; of 4 bits eight times as many as are."""
    if matrix.is_int4:
        return 8 * matrix.eighth
    if matrix.scales.shape[1] > 1:
        return min(most, matrix.group_size & -matrix.group_size)
    return min(most, max(16, 1 << (matrix.group_size - 1).bit_length()))


@triton.jit
def _linear(
    x,  # [num_rows, num_inputs]
    elements,  # [num_columns, num_inputs] int8, or e4m3 as its bytes; [num_columns, num_inputs / 8] int32 of 4 bits
    scales,  # [num_columns, groups]
    zeros,  # likewise bf16
    bias,  # [num_columns]
    out,  # [parts, num_rows, num_columns]
    num_rows,
    num_columns,
    num_inputs,
    num_words,  # of a row of elements
    num_groups,
    part_inputs,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale; 0: all
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    RUN: tl.constexpr,  # so many of them are of one group
    IS_EVEN: tl.constexpr,  # they divide num_inputs
    PLACE: tl.constexpr,
    REST: tl.constexpr,
):
    part, column = tl.program_id(1), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    is_row, is_column = row < num_rows, column < num_columns
    TIMES: tl.constexpr = 8 if FORMAT == 3 else 1  # numbers in a word
    EACH: tl.constexpr = INPUTS // TIMES
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(part * part_inputs, tl.minimum((part + 1) * part_inputs, num_inputs), INPUTS):
        word = begin // TIMES + tl.arange(0, EACH)
        at = column.to(tl.int64)[None, :] * num_words + word[:, None]
        words = tl.load(elements + at, is_column[None, :] if IS_EVEN else is_column[None, :] & (word < num_words)[:, None], 0)
        for number in tl.static_range(TIMES):
            first = begin + number * EACH
            group = column * num_groups + (first // GROUP if GROUP else 0)
            if number * EACH % RUN == 0:
                zero = tl.load(zeros + group, is_column, 0.0)[None, :] if HAS_ZEROS else 0
                products = tl.zeros([ROWS, COLUMNS], tl.float32) if GROUP else sums
            i = first + tl.arange(0, EACH)
            is_there = is_row[:, None] if IS_EVEN else is_row[:, None] & (i < num_inputs)[None, :]
            factor = tl.load(x + row[:, None] * num_inputs + i[None, :], is_there, 0.0)
            weight = _numbers(words, number, zero, FORMAT, HAS_ZEROS, PLACE, REST, factor.dtype)
            products = tl.dot(factor, weight, products, input_precision="ieee")
            if (number + 1) * EACH % RUN == 0:
                if GROUP:
                    products = sums + products * tl.load(scales + group, is_column, 0.0).to(tl.float32)[None, :]
                sums = products
    if not GROUP:
        sums *= tl.load(scales + column, is_column, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + column, is_column, 0.0).to(tl.float32)[None, :]
    to = out + (part * num_rows + row)[:, None] * num_columns + column[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), is_row[:, None] & is_column[None, :])


@triton.jit
def _numbers(
    words, number: tl.constexpr, zero, FORMAT: tl.constexpr, HAS_ZEROS: tl.constexpr, PLACE: tl.constexpr, REST: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """element - zero point, exact in every DTYPE; `number` is which of a word's."""
    if FORMAT == 3:
        pair = ((words >> (number // 2 * 4)) & 0x000F000F) | PLACE
        one = (pair >> (number % 2 * 16)).to(tl.uint16)
        value = one.to(DTYPE, bitcast=True) if PLACE else one.to(DTYPE)
        return value - (zero.to(DTYPE) + (REST + 8) if HAS_ZEROS else REST + 8)
    if FORMAT == 2:
        PLACED: tl.constexpr = tl.float16 if DTYPE.is_fp32() else DTYPE
        bits = (words.to(tl.int16) << PLACE) & ((0x7F << PLACE) - 0x8000)
        return bits.to(PLACED, bitcast=True).to(DTYPE) * REST
    return words.to(DTYPE) - zero.to(DTYPE) if HAS_ZEROS else words.to(DTYPE)


@triton.jit
def _join(
    sums,  # [PARTS, size] fp32
    bias,  # [num_columns]
    out,  # [size]
    size,
    num_columns,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PIECE: tl.constexpr,
):
    at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    total = tl.zeros([PIECE], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums + part * size + at, at < size, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % num_columns).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


@triton.jit
def _widen(
    elements,
    scales,
    zeros,
    out,  # [num_rows, num_inputs]
    num_rows,
    num_inputs,
    group_size,
    FORMAT: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    PLACE: tl.constexpr,
    REST: tl.constexpr,
):
    row, begin = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.program_id(0) * INPUTS
    is_row = row < num_rows
    TIMES: tl.constexpr = 8 if FORMAT == 3 else 1
    EACH: tl.constexpr = INPUTS // TIMES
    word = begin // TIMES + tl.arange(0, EACH)
    at = row[:, None] * (num_inputs // TIMES) + word[None, :]
    words = tl.load(elements + at, is_row[:, None] & (word < num_inputs // TIMES)[None, :], 0)
    for number in tl.static_range(TIMES):
        first = begin + number * EACH
        group = row * tl.cdiv(num_inputs, group_size) + first // group_size
        zero = tl.load(zeros + group, is_row, 0.0)[:, None] if HAS_ZEROS else 0
        values = _numbers(words, number, zero, FORMAT, HAS_ZEROS, PLACE, REST, tl.float32)
        values *= tl.load(scales + group, is_row, 0.0).to(tl.float32)[:, None]
        i = first + tl.arange(0, EACH)
        tl.store(
            out + row[:, None] * num_inputs + i[None, :],
            values.to(out.dtype.element_ty),
            is_row[:, None] & (i < num_inputs)[None, :],
        )
