"""../quantise.py on a GPU, to the bit: the Hadamard transform, and vectors as int8 or e4m3 with an fp16 scale each. What is written into a
pool and what is packed for one come from here.

Elements are rounded half to even, and fp8 by integer arithmetic, which the interpreter and every processor do alike.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr):
    """x [ROWS, WIDTH]: the transform of each run of RUN elements, in the order of torch's additions."""
    for stage in tl.static_range(0, 16):
        if (1 << stage) < RUN:
            a, b = tl.split(x.reshape(ROWS, WIDTH // (2 << stage), 2, 1 << stage).permute(0, 1, 3, 2))
            x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(ROWS, WIDTH)
    FACTOR: tl.constexpr = RUN**-0.5  # rounded to fp32 from fp64 as torch does it, not from a root in fp32
    return x * FACTOR


@triton.jit
def quantise(x, IS_INT8: tl.constexpr):
    """x [VECTORS, WIDTH] fp32 -> elements as uint8, int8's or e4m3's bits, and the bits of their fp16 scales [VECTORS] as int16."""
    limit: tl.constexpr = 127.0 if IS_INT8 else 448.0
    scale = tl.div_rn(tl.max(tl.where(x == x, tl.abs(x), 0.0), 1), limit)
    # From 65520 on fp16 rounds to infinity.
    is_bad = (tl.max(tl.where(x != x, 1, 0), 1) > 0) | ~(scale < 65520.0)
    half = tl.where(is_bad, 0.0, scale).to(tl.float16)
    divisor = half.to(tl.float32)[:, None]
    ratio = tl.div_rn(tl.where(is_bad[:, None], 0.0, x), tl.where(divisor == 0, 1.0, divisor))
    ratio = tl.where(divisor == 0, 0.0, tl.minimum(tl.maximum(ratio, -limit), limit))
    scale_bits = tl.where(is_bad, 0x7E00, half.to(tl.int16, bitcast=True)).to(tl.int16)
    if IS_INT8:
        return round_to_int8(ratio).to(tl.uint8, bitcast=True), scale_bits
    return round_to_e4m3(ratio), scale_bits


@triton.jit
def round_to_int8(x):
    """|x| <= 127: 1.5 * 2^23 + x has a last bit worth 1."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def round_to_e4m3(x):
    """|x| <= 448, to the nearest: native/numbers.h's narrow_to_e4m3, the byte."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 2^14 + |x| rounds to multiples of 2^-9, the smallest step.
    tiny = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    return (tl.where(size < 0x3C800000, tiny, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_as_half(x):
    """Bytes of e4m3 moved into the places of fp16, whose exponent counts 8 more: what they mean over 256. Those that are no numbers are
    some here."""
    return (((x & 0x7F).to(tl.uint16) << 7) | ((x & 0x80).to(tl.uint16) << 8)).to(tl.float16, bitcast=True)
