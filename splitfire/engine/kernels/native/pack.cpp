// KV blocks between a pool and a payload in one pass: gather, convert, zero what is past the valid tokens, digest.
//
// Plain loops over the formats of numbers.h, which the compiler turns into vector code, once for each generation of
// processors that CLONES names; the right one is chosen when the library is loaded. What the bytes mean is said in
// splitfire/core/layout.py, what they must be in ../pack.py and ../quantise.py, the digest in proto/splitfire/v1/kv.proto.
// Called through ctypes (__init__.py); nothing of Python is needed here.

#include "numbers.h"

#include <algorithm>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
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

// ---- The digest's sum: words times multipliers, modulo 2^64

INLINE uint64_t word_at(const uint8_t* bytes, int64_t i) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * i, 8);
    return word;
}

CLONES uint64_t sum_words(const uint8_t* bytes, int64_t num_words, const uint64_t* multipliers) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < num_words; ++i) sum += word_at(bytes, i) * multipliers[i];
    return sum;
}

INLINE uint64_t copy_words(const uint8_t* __restrict from, uint8_t* __restrict to, int64_t begin, int64_t end, const uint64_t* multipliers) {
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
        const uint64_t word = word_at(from, i);
        std::memcpy(to + 8 * i, &word, 8);
        sum += word * multipliers[i];
    }
    return sum;
}

// Three streams are more than the processor fetches ahead by itself: without the prefetches it is a third slower.
CLONES uint64_t copy_and_sum(const uint8_t* __restrict from, uint8_t* __restrict to, int64_t num_words, const uint64_t* multipliers) {
    constexpr int64_t PIECE = 64, LINE = 8, AHEAD = 192;  // words
    uint64_t sum = 0;
    int64_t i = 0;
    for (; i + PIECE <= num_words; i += PIECE) {
        for (int64_t line = i + AHEAD; line < i + AHEAD + PIECE; line += LINE) {
            __builtin_prefetch(from + 8 * line);
            __builtin_prefetch(multipliers + line);
            __builtin_prefetch(to + 8 * line, 1);
        }
        sum += copy_words(from, to, i, i + PIECE, multipliers);
    }
    return sum + copy_words(from, to, i, num_words, multipliers);
}

// Past the caches: the target is read next by somebody else, much later, and its lines need not be fetched to be overwritten.
INLINE void stream_line(const uint8_t* from, uint8_t* to) {
#if defined(__SSE2__)
    for (int64_t i = 0; i < 64; i += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
#else
    std::memcpy(to, from, 64);
#endif
}

INLINE void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// As copy_and_sum, for a target that is aligned to a cache line; `num_bytes` is a multiple of one. No digest: no multipliers.
CLONES uint64_t stream_and_sum(const uint8_t* __restrict from, uint8_t* __restrict to, int64_t num_bytes, const uint64_t* multipliers) {
    constexpr int64_t PIECE = 512, LINE = 64, AHEAD = 1536;  // bytes
    uint64_t sum = 0;
    for (int64_t at = 0; at < num_bytes; at += PIECE) {
        const int64_t end = std::min(at + PIECE, num_bytes);
        for (int64_t line = at; line < end; line += LINE) {
            __builtin_prefetch(from + line + AHEAD);
            if (multipliers) __builtin_prefetch(reinterpret_cast<const uint8_t*>(multipliers) + line + AHEAD);
            stream_line(from + line, to + line);
        }
        if (multipliers) sum += sum_words(from + at, (end - at) / 8, multipliers + at / 8);
    }
    return sum;
}

// Both with a digest or without one (no multipliers). `begin`: the first byte's place in its block.
uint64_t sum_range(const uint8_t* block, int64_t begin, int64_t num_bytes, const uint64_t* multipliers) {
    return multipliers ? sum_words(block + begin, num_bytes / 8, multipliers + begin / 8) : 0;
}

uint64_t copy_range(const uint8_t* from, uint8_t* to, int64_t num_bytes, const uint64_t* multipliers) {
    if (multipliers) return copy_and_sum(from, to, num_bytes / 8, multipliers);
    std::memcpy(to, from, size_t(num_bytes));
    return 0;
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

// ---- Blocks

// Twin of _Shape in __init__.py. A block has `num_rows` rows, one for each layer, side (K, then V) and head; a row is
// `block_size` tokens (a multiple of 8, so that it is whole words) of `head_dim` elements (at most TILE).
struct Shape {
    int64_t num_rows, rows_per_side, block_size, head_dim;
    int64_t pool_block_bytes, payload_block_bytes;
    int64_t source, target;  // indices of FORMATS

    bool is_key(int64_t row) const { return row / rows_per_side % 2 == 0; }
};

// One block in one of the two formats. The block of the pool is only read.
struct Block {
    uint8_t* bytes;
    const Format& format;
    int64_t row_bytes, scale_offset, scale_row_bytes;

    Block(const Shape& shape, const Format& format, const uint8_t* bytes)
        : bytes(const_cast<uint8_t*>(bytes)), format(format),
          row_bytes(shape.block_size * shape.head_dim * format.element_bytes),
          scale_offset(shape.num_rows * row_bytes),
          scale_row_bytes(format.has_scales ? shape.block_size * 2 : 0) {}

    uint8_t* elements(int64_t row) const { return bytes + row * row_bytes; }
    uint16_t* scales(int64_t row) const { return reinterpret_cast<uint16_t*>(bytes + scale_offset + row * scale_row_bytes); }
};

void convert_row(const Shape& shape, const Block& from, const Block& to, int64_t row, int64_t valid) {
    alignas(64) float wide[TILE];
    const int64_t tokens_per_tile = std::min(MAX_TOKENS, TILE / shape.head_dim);
    const bool is_transformed = shape.is_key(row) && from.format.has_scales != to.format.has_scales;
    for (int64_t token = 0; token < valid; token += tokens_per_tile) {
        const int64_t tokens = std::min(tokens_per_tile, valid - token), element = token * shape.head_dim;
        const uint8_t* in = from.elements(row) + element * from.format.element_bytes;
        uint8_t* out = to.elements(row) + element * to.format.element_bytes;
        from.format.load(in, from.scales(row) + token, tokens, shape.head_dim, wide);
        if (is_transformed) hadamard(wide, tokens * shape.head_dim, shape.head_dim & -shape.head_dim);
        to.format.store(wide, tokens, shape.head_dim, out, to.scales(row) + token);
    }
}

void copy_row(const Shape& shape, const Block& from, const Block& to, int64_t row, int64_t valid) {
    std::memcpy(to.elements(row), from.elements(row), size_t(valid * shape.head_dim * to.format.element_bytes));
    if (to.format.has_scales) std::memcpy(to.scales(row), from.scales(row), size_t(valid) * 2);
}

void zero_rest_of_row(const Shape& shape, const Block& to, int64_t row, int64_t valid) {
    const int64_t begin = valid * shape.head_dim * to.format.element_bytes;
    std::memset(to.elements(row) + begin, 0, size_t(to.row_bytes - begin));
    if (to.format.has_scales) std::memset(to.scales(row) + valid, 0, size_t(shape.block_size - valid) * 2);
}

// One block of `valid` tokens; its sum. A row is summed as soon as it is written, while it is in the cache.
uint64_t pack_block(const Shape& shape, const Block& from, const Block& to, int64_t valid, const uint64_t* multipliers) {
    const int64_t content = to.scale_offset + shape.num_rows * to.scale_row_bytes;
    std::memset(to.bytes + content, 0, size_t(shape.payload_block_bytes - content));  // padding adds nothing to the sum
    const bool is_same = shape.source == shape.target;
    if (is_same && valid == shape.block_size) return copy_range(from.bytes, to.bytes, content, multipliers);
    uint64_t sum = 0;
    for (int64_t row = 0; row < shape.num_rows; ++row) {
        (is_same ? copy_row : convert_row)(shape, from, to, row, valid);
        zero_rest_of_row(shape, to, row, valid);
        sum += sum_range(to.bytes, row * to.row_bytes, to.row_bytes, multipliers);
        sum += sum_range(to.bytes, to.scale_offset + row * to.scale_row_bytes, to.scale_row_bytes, multipliers);
    }
    return sum;
}

}  // namespace

// ---- What ctypes calls. `multipliers`: one for each word of a payload block, or null for no digest; `sums`: one a block

extern "C" {

int splitfire_version() { return 2; }  // of what stands here and in __init__.py

void splitfire_pack(const Shape* shape, const uint8_t* pool, const int64_t* block_ids, int64_t num_blocks, int64_t num_tokens,
                    uint8_t* payload, const uint64_t* multipliers, uint64_t* sums) {
    for (int64_t i = 0; i < num_blocks; ++i) {
        const Block from(*shape, FORMATS[shape->source], pool + block_ids[i] * shape->pool_block_bytes);
        const Block to(*shape, FORMATS[shape->target], payload + i * shape->payload_block_bytes);
        const int64_t valid = std::clamp<int64_t>(num_tokens - i * shape->block_size, 0, shape->block_size);
        sums[i] = pack_block(*shape, from, to, valid, multipliers);
    }
}

// A payload in the pool's own format: copied as it is. Blocks of a pool begin at cache lines.
void splitfire_unpack(int64_t block_bytes, uint8_t* pool, const int64_t* block_ids, int64_t num_blocks, const uint8_t* payload,
                      const uint64_t* multipliers, uint64_t* sums) {
    for (int64_t i = 0; i < num_blocks; ++i) {
        sums[i] = stream_and_sum(payload + i * block_bytes, pool + block_ids[i] * block_bytes, block_bytes, multipliers);
    }
    finish_streams();
}

}
