// The number formats of KV, one value at a time, without branches, so that a loop over any of these becomes vector code.
//
// Rounding is to nearest, ties to even, with subnormals. A NaN that is narrowed becomes the positive quiet NaN. All of it is
// integer arithmetic or one exactly rounded operation: every compiler and processor gives the same bits (with
// -ffp-contract=off), and ../quantise.py and ../pack.py give them too.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

constexpr uint32_t SIZE_MASK = 0x7FFFFFFF;   // all but the sign
constexpr uint32_t INFINITY_BITS = 0x7F800000;  // sizes above are NaN
constexpr uint16_t HALF_NAN = 0x7E00;

INLINE uint32_t exponent_bits(uint32_t exponent) { return exponent << 23; }

INLINE uint32_t narrow_to_fp32(float x) {
    const uint32_t bits = bits_of(x);
    return (bits & SIZE_MASK) > INFINITY_BITS ? 0x7FC00000 : bits;
}

INLINE float widen_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

INLINE uint16_t narrow_to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & SIZE_MASK) > INFINITY_BITS ? 0x7FC0 : rounded);
}

INLINE float widen_fp16(uint16_t x) {
    const uint32_t size = x & 0x7FFF;
    const uint32_t normal = (size << 13) + exponent_bits(127 - 15);
    const uint32_t subnormal = bits_of(float(int32_t(size)) * 0x1p-24f);
    const uint32_t special = normal + exponent_bits(127 - 15);  // exponent 31 becomes 255
    const uint32_t wide = size < 0x0400 ? subnormal : size < 0x7C00 ? normal : special;
    return float_of(wide | uint32_t(x & 0x8000) << 16);
}

INLINE uint16_t narrow_to_fp16(float x) {
    const uint32_t bits = bits_of(x), size = bits & SIZE_MASK;
    // Adding 0.5 lets the addition itself round to multiples of 2^-24, half precision's smallest step.
    const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (size - exponent_bits(127 - 15) + 0x0FFF + (size >> 13 & 1)) >> 13;
    const uint32_t narrow = size < 0x38800000 ? subnormal : size < 0x47800000 ? normal : 0x7C00;
    return uint16_t(size > INFINITY_BITS ? HALF_NAN : narrow | (bits >> 16 & 0x8000));
}

// x / divisor, exactly rounded, for a divisor that is a finite fp16 number above 0 and its inverse = 1 / divisor: three operations
// where a division takes ten. A product with the inverse errs by at most two of its last bits; what is left of x then fits
// 13 bits, so that the first fma is exact; and the second rounds rightly, because x / divisor with a divisor of 11 bits is
// never nearer to the middle of two floats than 2^-12 of their distance (Markstein 1990). Where it gets subnormal, it may err; and of -0 it
// loses the sign.
INLINE float divide(float x, float divisor, float inverse) {
    const float quotient = x * inverse;
    return std::fma(std::fma(-quotient, divisor, x), inverse, quotient);
}

INLINE float widen_int8(int8_t x) { return float(int32_t(x)); }

// |x| < 2^22, saturating to 127. In 1.5 * 2^23 + x the last bit of the mantissa is worth 1: the addition rounds.
INLINE int8_t narrow_to_int8(float x) {
    const int32_t rounded = int32_t(bits_of(x + 0x1.8p23f) - bits_of(0x1.8p23f));
    return int8_t(std::min(std::max(rounded, -127), 127));
}

// e4m3 without infinities (Micikevicius et al. 2022): exponent bias 7, the size 0x7F is NaN, 448 the largest number.
INLINE float widen_e4m3(uint8_t x) {
    const uint32_t size = x & 0x7F;
    const uint32_t normal = (size << 20) + exponent_bits(127 - 7);
    const uint32_t subnormal = bits_of(float(int32_t(size)) * 0x1p-9f);
    const uint32_t wide = size < 0x08 ? subnormal : size < 0x7F ? normal : 0x7FC00000;
    return float_of(wide | uint32_t(x & 0x80) << 24);
}

// Saturating to 448.
INLINE uint8_t narrow_to_e4m3(float x) {
    const uint32_t bits = bits_of(x), size = std::min(bits & SIZE_MASK, bits_of(448.0f));
    // As in fp16: 2^14 + x rounds to multiples of 2^-9.
    const uint32_t subnormal = bits_of(float_of(size) + 0x1p14f) - bits_of(0x1p14f);
    const uint32_t normal = (size - exponent_bits(127 - 7) + 0x7FFFF + (size >> 20 & 1)) >> 20;
    return uint8_t((size < 0x3C800000 ? subnormal : normal) | (bits >> 24 & 0x80));
}
