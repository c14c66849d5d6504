// KV blocks between a pool and a payload in one pass: gather, convert, zero what is past the valid tokens, digest.
//
// Conversion is that of vectors.h. What the bytes mean is said in
// splitfire/core/layout.py, what they must be in ../pack.py and ../quantise.py, the digest in proto/splitfire/v1/kv.proto.
// Called through ctypes (__init__.py); nothing of Python is needed here.

#include "vectors.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

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
