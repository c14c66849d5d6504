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

// Lanes from `first` on of `count` floats, and zeros.
INLINE __mmask16 lanes_of(int64_t first, int64_t count) { return __mmask16((1u << std::clamp<int64_t>(count - first, 0, LANES)) - 1); }
INLINE Floats load_some(const float* from, int64_t first, int64_t count) { return _mm512_maskz_loadu_ps(lanes_of(first, count), from + first); }

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

// e^x, x at most 0, to 2^-17: far more than bf16 keeps of it. 2^fraction by a polynomial (minimax on half a unit to both sides).
INLINE Floats exponential_to_round(Floats x) {
    const Floats t = _mm512_mul_ps(at_least(-104.0f, x), splat(1.44269504088896341f));
    const Floats n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(t, n);
    Floats p = splat(9.582853220e-03f);
    p = fma(p, f, splat(5.590642621e-02f));
    p = fma(p, f, splat(2.402409862e-01f));
    p = fma(p, f, splat(6.931241932e-01f));
    return _mm512_scalef_ps(fma(p, f, splat(1.0f)), n);
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

// Of 32 numbers in quarters of eight the lower fours and the upper ones, back into the order of their places.
INLINE void merge_quarters(Floats& lower, Floats& upper) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const Floats first = _mm512_permutex2var_ps(lower, low, upper);
    upper = _mm512_permutex2var_ps(lower, _mm512_add_epi32(low, _mm512_set1_epi32(8)), upper);
    lower = first;
}

// Two numbers in bf16 lie in the 32 bits of a lane. Only processors with AVX512_BF16 have their dot product; others are never asked for it.
#ifdef __AVX512BF16__
constexpr bool HAS_BF16_UNITS = true;

// sum + a's first * b's first + a's second * b's second, in each lane.
INLINE Floats dot(Floats sum, Floats a, Floats b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
// Not _mm512_mask_dpbf16_ps: GCC 12 takes its mask for one of eight lanes, and loses the others wherever it moves it with kmovb.
INLINE Floats dot_some(Floats sum, __mmask16 lanes, Floats a, Floats b) { return _mm512_mask_mov_ps(sum, lanes, dot(sum, a, b)); }

// Sixteen numbers rounded to bf16, ties to even, subnormals to zero: side by side, and each with that of the other vector.
INLINE void store_narrow(uint16_t* to, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE Floats narrow_pairs(Floats first, Floats second) {
    const __m512i ascending = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                                0x180008, 0x190009, 0x1A000A, 0x1B000B, 0x1C000C, 0x1D000D, 0x1E000E, 0x1F000F);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(ascending, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
}
#else
constexpr bool HAS_BF16_UNITS = false;
INLINE Floats dot(Floats, Floats, Floats) { __builtin_unreachable(); }
INLINE Floats dot_some(Floats, __mmask16, Floats, Floats) { __builtin_unreachable(); }
INLINE void store_narrow(uint16_t*, Floats) { __builtin_unreachable(); }
INLINE Floats narrow_pairs(Floats, Floats) { __builtin_unreachable(); }
#endif

// The same of numbers that bf16 holds exactly.
INLINE Floats join_pairs(Floats first, Floats second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(second)));
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

// Elements [0, 16) of two vectors side by side in bf16, which holds them exactly.
template <Kv FORMAT> INLINE Floats pair_up(const uint8_t* first, const uint8_t* second) { return join_pairs(widen<FORMAT>(first), widen<FORMAT>(second)); }

}  // namespace
