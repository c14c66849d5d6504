// Vectors of KV in their formats: to fp32 and back, and the Hadamard transform of keys.
//
// Plain loops over the formats of numbers.h, which the compiler turns into vector code: once for each generation of processors
// that CLONES names, the right one chosen when the library is loaded, or only for the one that the whole file is built for.

#pragma once

#include "numbers.h"

#include <algorithm>

#if defined(__AVX512F__)
#define CLONES static
#elif defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

constexpr int64_t TILE = 2048;  // numbers between a load and a store: 8 KiB, so they stay in the first level of cache
constexpr int64_t MAX_TOKENS = 64;  // in a tile

// ---- From a format to fp32, and back: `tokens` vectors of `head_dim` that lie one after the other

CLONES void load_bf16(const void* elements, const uint16_t*, int64_t tokens, int64_t head_dim, float* __restrict wide) {
    const auto* in = static_cast<const uint16_t*>(elements);
    for (int64_t i = 0; i < tokens * head_dim; ++i) wide[i] = widen_bf16(in[i]);
}

CLONES void load_fp16(const void* elements, const uint16_t*, int64_t tokens, int64_t head_dim, float* __restrict wide) {
    const auto* in = static_cast<const uint16_t*>(elements);
    for (int64_t i = 0; i < tokens * head_dim; ++i) wide[i] = widen_fp16(in[i]);
}

CLONES void load_fp32(const void* elements, const uint16_t*, int64_t tokens, int64_t head_dim, float* __restrict wide) {
    std::memcpy(wide, elements, size_t(tokens * head_dim) * sizeof(float));
}

CLONES void load_int8(const void* elements, const uint16_t* scales, int64_t tokens, int64_t head_dim, float* __restrict wide) {
    const auto* in = static_cast<const int8_t*>(elements);
    for (int64_t token = 0; token < tokens; ++token, in += head_dim, wide += head_dim) {
        const float scale = widen_fp16(scales[token]);
        for (int64_t i = 0; i < head_dim; ++i) wide[i] = widen_int8(in[i]) * scale;
    }
}

CLONES void load_e4m3(const void* elements, const uint16_t* scales, int64_t tokens, int64_t head_dim, float* __restrict wide) {
    const auto* in = static_cast<const uint8_t*>(elements);
    for (int64_t token = 0; token < tokens; ++token, in += head_dim, wide += head_dim) {
        const float scale = widen_fp16(scales[token]);
        for (int64_t i = 0; i < head_dim; ++i) wide[i] = widen_e4m3(in[i]) * scale;
    }
}

CLONES void store_bf16(const float* __restrict wide, int64_t tokens, int64_t head_dim, void* elements, uint16_t*) {
    auto* out = static_cast<uint16_t*>(elements);
    for (int64_t i = 0; i < tokens * head_dim; ++i) out[i] = narrow_to_bf16(wide[i]);
}

CLONES void store_fp16(const float* __restrict wide, int64_t tokens, int64_t head_dim, void* elements, uint16_t*) {
    auto* out = static_cast<uint16_t*>(elements);
    for (int64_t i = 0; i < tokens * head_dim; ++i) out[i] = narrow_to_fp16(wide[i]);
}

CLONES void store_fp32(const float* __restrict wide, int64_t tokens, int64_t head_dim, void* elements, uint16_t*) {
    auto* out = static_cast<uint32_t*>(elements);
    for (int64_t i = 0; i < tokens * head_dim; ++i) out[i] = narrow_to_fp32(wide[i]);
}

// What dividing by a vector's scale takes. No inverse: the scale is zero or NaN, and so every element is zero.
struct Divisors {
    float divisor[MAX_TOKENS], inverse[MAX_TOKENS];
};

// The scales of `tokens` vectors, as stored: those of ../quantise.py.
INLINE void store_scales(const float* wide, int64_t tokens, int64_t head_dim, float largest_element, uint16_t* scales, Divisors& by) {
    uint32_t largest[MAX_TOKENS];  // of the sizes' bits, which are ordered like the sizes; a NaN is above all
    for (int64_t token = 0; token < tokens; ++token, wide += head_dim) {
        uint32_t most = 0;
        for (int64_t i = 0; i < head_dim; ++i) most = std::max(most, bits_of(wide[i]) & SIZE_MASK);
        largest[token] = most;
    }
    for (int64_t token = 0; token < tokens; ++token) {
        const uint16_t scale = narrow_to_fp16(float_of(largest[token]) / largest_element);
        scales[token] = scale < 0x7C00 ? scale : HALF_NAN;
        by.divisor[token] = widen_fp16(scale);
        by.inverse[token] = 0 < scale && scale < 0x7C00 ? 1.0f / by.divisor[token] : 0.0f;
    }
}

CLONES void store_int8(const float* __restrict wide, int64_t tokens, int64_t head_dim, void* elements, uint16_t* scales) {
    auto* __restrict out = static_cast<int8_t*>(elements);
    Divisors by;
    store_scales(wide, tokens, head_dim, 127.0f, scales, by);
    for (int64_t token = 0; token < tokens; ++token, out += head_dim, wide += head_dim) {
        const float divisor = by.divisor[token], inverse = by.inverse[token];
        if (inverse > 0) {
            for (int64_t i = 0; i < head_dim; ++i) out[i] = narrow_to_int8(divide(wide[i], divisor, inverse));
        } else {
            std::memset(out, 0, size_t(head_dim));
        }
    }
}

CLONES void store_e4m3(const float* __restrict wide, int64_t tokens, int64_t head_dim, void* elements, uint16_t* scales) {
    auto* __restrict out = static_cast<uint8_t*>(elements);
    Divisors by;
    store_scales(wide, tokens, head_dim, 448.0f, scales, by);
    for (int64_t token = 0; token < tokens; ++token, out += head_dim, wide += head_dim) {
        const float divisor = by.divisor[token], inverse = by.inverse[token];
        if (inverse > 0) {
            for (int64_t i = 0; i < head_dim; ++i) {
                const float quotient = divide(wide[i], divisor, inverse);
                out[i] = narrow_to_e4m3(std::copysign(quotient, wide[i]));
            }
        } else {
            std::memset(out, 0, size_t(head_dim));
        }
    }
}

// ---- The Hadamard transform of keys: that of ../quantise.py, also in the order of its additions

// STAGES of the butterflies of a run, those with strides 1, 2, 4, ... A stage puts the sums of neighbours into the lower half and
// their differences into the upper one, which turns the bits of their places by one: the next stage's partners are neighbours
// again, and after the last one all are where they belong (Pease 1968). Bounds are constants, so that registers hold the run.
template <int64_t SIZE, int64_t STAGES> INLINE void transform_run(const float* from, float* result) {
    float mixed[SIZE];
    float* to = STAGES == 1 ? result : mixed;
    for (int64_t i = 0; i < SIZE / 2; ++i) {
        const float a = from[2 * i], b = from[2 * i + 1];
        to[i] = a + b;
        to[SIZE / 2 + i] = a - b;
    }
    if constexpr (STAGES > 1) transform_run<SIZE, STAGES - 1>(mixed, result);
}

template <int64_t SIZE, int64_t STAGES> INLINE void transform_runs(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += SIZE) transform_run<SIZE, STAGES>(x + i, x + i);
}

constexpr int64_t MAX_RUN = 64;

// Of `count` numbers, in runs of `size`, a power of two that divides `count`. In place.
CLONES void hadamard(float* __restrict x, int64_t count, int64_t size) {
    switch (std::min(size, MAX_RUN)) {
        case 1: return;
        case 2: transform_runs<2, 1>(x, count); break;
        case 4: transform_runs<4, 2>(x, count); break;
        case 8: transform_runs<8, 3>(x, count); break;
        case 16: transform_runs<16, 4>(x, count); break;
        case 32: transform_runs<32, 5>(x, count); break;
        case 64: transform_runs<64, 6>(x, count); break;
    }
    for (int64_t stride = MAX_RUN; stride < size; stride *= 2) {
        for (int64_t begin = 0; begin < count; begin += 2 * stride) {
            for (int64_t i = begin; i < begin + stride; ++i) {
                const float a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
        }
    }
    const float norm = float(1.0 / std::sqrt(double(size)));
    for (int64_t i = 0; i < count; ++i) x[i] *= norm;
}

struct Format {
    int64_t element_bytes;
    bool has_scales;
    void (*load)(const void*, const uint16_t*, int64_t, int64_t, float*);
    void (*store)(const float*, int64_t, int64_t, void*, uint16_t*);
};

const Format FORMATS[] = {  // in the order of core/layout.py's DTYPE_BYTES
    {2, false, load_bf16, store_bf16},
    {2, false, load_fp16, store_fp16},
    {4, false, load_fp32, store_fp32},
    {1, true, load_int8, store_int8},
    {1, true, load_e4m3, store_e4m3},
};

}  // namespace
