"""`add_rms_norm` and `silu_mul`: ../norm.py's ops, with the residual added on the way. A program for each row, or piece of one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024  # elements of a row that a program of `silu_mul` takes


def add_rms_norm(
    hidden: Tensor,  # [num_rows, width], contiguous; written when there is an update
    update: Tensor | None,  # [num_rows, width], added to it first, rounded to its dtype
    weight: Tensor,  # [width]
    eps: float,
) -> Tensor:  # [num_rows, width], dtype of hidden
    """hidden += update; rms_norm(hidden) * weight."""
    num_rows, width = hidden.shape
    out = torch.empty_like(hidden)
    if num_rows:
        _add_rms_norm[num_rows,](
            hidden, hidden if update is None else update, weight, out, width, eps, triton.next_power_of_2(width), update is not None,
            num_warps=8 if width > 2048 else 4,
        )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[num_rows, 2 * width], contiguous -> [num_rows, width]: silu of the first half times the second."""
    num_rows, both = gate_up.shape
    out = gate_up.new_empty(num_rows, both // 2)
    if num_rows:
        _silu_mul[num_rows, triton.cdiv(both // 2, PIECE)](gate_up, out, both // 2, PIECE)
    return out


@triton.jit
def _add_rms_norm(
    hidden,  # [rows, width]
    update,  # [rows, width]
    weight,  # [width]
    out,  # [rows, width]
    width,
    eps,
    WIDTH: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
):
    i = tl.arange(0, WIDTH)
    is_there = i < width
    at = tl.program_id(0).to(tl.int64) * width + i
    x = tl.load(hidden + at, is_there, 0.0)
    if HAS_UPDATE:
        x = (x.to(tl.float32) + tl.load(update + at, is_there, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(hidden + at, x, is_there)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * factor).to(x.dtype).to(tl.float32) * tl.load(weight + i, is_there, 0.0).to(tl.float32)
    tl.store(out + at, normed.to(x.dtype), is_there)


@triton.jit
def _silu_mul(
    gate_up,  # [rows, 2 * width]
    out,  # [rows, width]
    width,
    PIECE: tl.constexpr,
):
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    is_there = i < width
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * width + i, is_there, 0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, is_there, 0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + i, (silu * up).to(gate.dtype), is_there)
