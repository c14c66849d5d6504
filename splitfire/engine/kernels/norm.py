"""`rms_norm` and `silu_mul`: the small ops between the matrix products. Norms are computed in fp32 whatever the dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019); any leading shape, dtype of x."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """[num_tokens, 2 * intermediate] -> [num_tokens, intermediate]: silu of the first half times the second (SwiGLU)."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up
