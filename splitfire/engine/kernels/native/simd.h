// Sixteen floats at a time (AVX-512), and the orders in which they are added up.
//
// Whatever a step computes is a chain of operations in an order that depends on nothing but the model: not on how many rows
// a step has, where a chunk ends, or which thread does it. So a token's KV and logits are the same bits in any batch.

#pragma once

#include "numbers.h"

#include <immintrin.h>

namespace {

constexpr int64_t LANES = 16;

using Floats = __m512;

INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// In these a NaN in the second place stays one.
INLINE Floats at_least(float low, Floats x) { return _mm512_max_ps(splat(low), x); }
INLINE Floats at_most(float high, Floats x) { return _mm512_min_ps(splat(high), x); }

// e^x to two units in the last place; 0 below -104, and of a NaN a NaN. Cody and Waite's reduction, Cephes' polynomial (Moshier).
INLINE Floats exponential(Floats x) {
    x = at_most(88.7f, at_least(-104.0f, x));
    const Floats n = _mm512_roundscale_ps(_mm512_mul_ps(x, splat(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(_mm512_mul_ps(r, r), p, r);
    return _mm512_scalef_ps(_mm512_add_ps(p, splat(1.0f)), n);
}

INLINE float exponential(float x) { return _mm512_cvtss_f32(exponential(splat(x))); }

// (l, l + 8), then (l, l + 4), (l, l + 2), (l, l + 1): the order of every sum over lanes.
INLINE float sum(Floats x) {
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4E));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0x4E));
    x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0xB1));
    return _mm512_cvtss_f32(x);
}

// The sums of sixteen vectors: lane i of the result is `sum` of vectors[i * stride].
INLINE Floats sums(const float* vectors, int64_t stride) {
    const auto at = [&](int64_t i) { return load(vectors + i * stride); };
    const auto halves = [](Floats a, Floats b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    };
    const auto quarters = [](Floats a, Floats b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    const auto pairs = [](Floats a, Floats b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE)); };
    const auto ones = [](Floats a, Floats b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD)); };
    // Four vectors a quarter of the result each: i, i + 4, i + 8, i + 12.
    const auto four = [&](int64_t i) { return quarters(halves(at(i), at(i + 4)), halves(at(i + 8), at(i + 12))); };
    return ones(pairs(four(0), four(1)), pairs(four(2), four(3)));
}

// 32 numbers in bf16, those at even places and those at odd ones; and 16 and 16 back into the order of their places.
INLINE void split_bf16(__m512i pairs, Floats& even, Floats& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000))));
}

INLINE void interleave(Floats& even, Floats& odd) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Floats first = _mm512_permutex2var_ps(even, low, odd);
    odd = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd);
    even = first;
}

INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }

// Sixteen elements of a KV format as floats; e4m3 lacks a factor of E4M3_FACTOR, which its scale takes on.
enum class Kv : int64_t { BF16, FP16, FP32, INT8, E4M3 };  // in the order of core/layout.py's DTYPE_BYTES
constexpr float E4M3_FACTOR = 256.0f;

template <Kv FORMAT> constexpr int64_t KV_BYTES = FORMAT == Kv::FP32 ? 4 : FORMAT <= Kv::FP16 ? 2 : 1;

template <Kv FORMAT> INLINE Floats widen(const uint8_t* from) {
    if constexpr (FORMAT == Kv::FP32) return _mm512_loadu_ps(from);
    if constexpr (FORMAT == Kv::FP16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    if constexpr (FORMAT == Kv::BF16) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    if constexpr (FORMAT == Kv::INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    if constexpr (FORMAT == Kv::E4M3) {  // moved into the places of fp16, whose exponent counts 8 more
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m256i size = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7);
        return _mm512_cvtph_ps(_mm256_or_si256(size, _mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0x8000)))));
    }
}

}  // namespace
