"""SplitMix64 (Steele, Lea, Flood 2014): what ../sample.py's noise and kv.proto's digests are made of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(key, number):
    """Of key + number times its constant: uint64."""
    x = key + number.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
