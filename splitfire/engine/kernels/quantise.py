"""`quantise` and `dequantise`: the one place of the arithmetic between numbers and quantised KV. Torch; any device.

One fp16 scale for each vector of `head_dim` elements, that is per token, head, and key or value: keys have outlier channels and
values outlier tokens, and neither then costs the other tokens any precision. Symmetric, dynamic, nothing calibrated.

    scale = fp16(absmax / largest)        largest: 127 for int8, 448 for fp8_e4m3
    element = round(clamp(x / scale))     half to even for int8, torch's own rounding for fp8

A scale that fp16 rounds to zero has elements of zero. A vector with a NaN or an infinity in it, or with a scale beyond fp16,
gets the scale NaN and elements of zero: what is dequantised from it is NaN, never a number that looks right. Inputs and
results are the same bytes on every backend; native/ writes them too, and tests hold it to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] of any float dtype -> elements [..., head_dim] of `dtype` and scales [...] fp16."""
    largest, wide = LARGEST[dtype], x.float()
    scales = (wide.abs().amax(-1) / largest).half()
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    divisors = scales.float().unsqueeze(-1)
    ratios = torch.where(divisors > 0, wide / divisors, 0.0).clamp_(-largest, largest)
    return (ratios.round_() if dtype == torch.int8 else ratios).to(dtype), scales


def dequantise(elements: Tensor, scales: Tensor) -> Tensor:
    """elements [..., head_dim], scales [...] -> [..., head_dim] fp32."""
    return elements.float().mul_(scales.float().unsqueeze(-1))
