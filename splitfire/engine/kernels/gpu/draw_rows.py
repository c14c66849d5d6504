"""`draw_rows`: what the draw takes for each row of a step, from what the device keeps of each lane: its sampling parameters, and the part
of the noise's key that does not depend on the position (../sample.py's noise_key).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu.sample import NONE, DrawRows
from splitfire.engine.kernels.gpu.splitmix import mix

PIECE = 128


@dataclass(frozen=True, slots=True)
class LaneParameters:
    """Of each lane, as `DrawRows` has them of each row."""

    temperatures: Tensor  # [num_lanes] fp32
    top_k: Tensor  # [num_lanes] int32
    top_p: Tensor  # [num_lanes] fp32
    min_p: Tensor  # [num_lanes] fp32, logarithms
    keys: Tensor  # [num_lanes] int64: of seed and choice

    @staticmethod
    def of(num_lanes: int, device: torch.device) -> LaneParameters:
        floats, ints = torch.zeros(3, num_lanes, device=device), torch.zeros(num_lanes, dtype=torch.int32, device=device)
        return LaneParameters(floats[0], ints, floats[1], floats[2], torch.zeros(num_lanes, dtype=torch.int64, device=device))


def draw_rows(lanes: LaneParameters, row_lanes: Tensor, positions: Tensor) -> DrawRows:
    """row_lanes [num_rows] int32, below zero for rows that nobody asks about, whose draw is then the cheapest; positions [num_rows]
    int64: of each row's token, so that the token to draw comes one later."""
    num_rows, device = len(positions), positions.device
    floats, top_k = torch.empty(3, num_rows, device=device), torch.empty(num_rows, dtype=torch.int32, device=device)
    keys = torch.empty(num_rows, dtype=torch.int64, device=device)
    _draw_rows[triton.cdiv(num_rows, PIECE),](
        lanes.temperatures,
        lanes.top_k,
        lanes.top_p,
        lanes.min_p,
        lanes.keys,
        row_lanes,
        positions,
        floats,
        top_k,
        keys,
        num_rows,
        PIECE,
    )
    none = torch.full((num_rows,), NONE, dtype=torch.int32, device=device)
    return DrawRows(floats[0], top_k, floats[1], floats[2], keys, none, none)


@triton.jit
def _draw_rows(
    temperatures, lane_top_k, lane_top_p, lane_min_p, lane_keys,  # [num_lanes]
    row_lanes,  # [num_rows]
    positions,  # [num_rows]
    floats,  # [3, num_rows], written: temperature, top_p, min_p
    top_k,  # [num_rows], written
    keys,  # [num_rows], written
    num_rows,
    PIECE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    is_row = i < num_rows
    lane = tl.load(row_lanes + i, is_row, -1)
    is_there = lane >= 0
    tl.store(floats + i, tl.load(temperatures + lane, is_there, 0.0), is_row)
    tl.store(floats + num_rows + i, tl.load(lane_top_p + lane, is_there, 1.0), is_row)
    tl.store(floats + 2 * num_rows + i, tl.load(lane_min_p + lane, is_there, float("-inf")), is_row)
    tl.store(top_k + i, tl.load(lane_top_k + lane, is_there, 0), is_row)
    position = tl.load(positions + i, is_row, 0) + 1
    key = mix(tl.load(lane_keys + lane, is_there, 0).to(tl.uint64, bitcast=True), position)
    tl.store(keys + i, key.to(tl.int64, bitcast=True), is_row)
