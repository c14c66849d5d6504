"""Which GPUs the kernels have tiles and warps for. Those of each were chosen by compiling ahead: what ptxas and LLVM spill nothing of."""

from __future__ import annotations

import functools
from typing import Literal

import torch

Chip = Literal["sm_90", "sm_80", "gfx942"]


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The one whose choices suit `device`; no GPU counts as the newest, for the interpreter."""
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_80" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9 else "sm_90"
