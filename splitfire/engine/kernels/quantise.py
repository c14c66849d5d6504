"""`hadamard`, `quantise` and `dequantise`: the one place of the arithmetic between numbers and quantised KV. Torch; any device.

One fp16 scale for each vector of `head_dim` elements, that is per token, head, and key or value: keys have outlier channels and
values outlier tokens, and neither then costs the other tokens any precision. Symmetric, dynamic, nothing calibrated.

Within a vector an outlier channel would cost the other channels theirs, so quantised caches keep `hadamard` of each key, which
spreads it over all of them. Queries are transformed likewise, and their products with keys stay what they were: (qH)(kH)' = qk'
(QuaRot, Ashkboos et al. 2024). Values have no such channels and stay as they are.

    scale = fp16(absmax / largest)        largest: 127 for int8, 448 for fp8_e4m3
    element = round(clamp(x / scale))     half to even for int8, torch's own rounding for fp8

A scale that fp16 rounds to zero has elements of zero. A vector with a NaN or an infinity in it, or with a scale beyond fp16,
gets the scale NaN and elements of zero: what is dequantised from it is NaN, never a number that looks right. Inputs and
results are the same bytes on every backend; native/ writes them too, and tests hold it to that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def hadamard(x: Tensor) -> Tensor:
    """x [..., head_dim] of any float dtype, fp32 back: the Walsh-Hadamard transform of each run of `size` elements, the largest
    power of two that divides head_dim, normalised. It is its own inverse. Butterflies with strides 1, 2, 4, ..., always in that
    order, and the norm last: every backend rounds alike.
    """
    size = x.shape[-1] & -x.shape[-1]
    runs = x.float().reshape(-1, size).t().clone(memory_format=torch.contiguous_format)  # [size, num_runs]: long rows to add
    for stage in range(size.bit_length() - 1):
        a, b = runs.view(-1, 2, 1 << stage, runs.shape[1]).unbind(1)
        differences = a - b
        a += b
        b.copy_(differences)
    return runs.mul_(1 / math.sqrt(size)).t().contiguous().view(x.shape)


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
