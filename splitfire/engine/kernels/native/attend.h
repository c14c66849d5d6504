// Causal attention of rows of queries over one sequence's keys and values of one head, straight from the paged pool.
//
// The context is worked off in parts of 64 tokens, cut at absolute positions. A part has its own maximum, sum and weighted values, and parts
// are merged in ascending order (Dao 2023, Milakov and Gimelshein 2018): whoever computes them, and beside whichever other rows. Few rows read a
// part as it lies; for many rows it is first turned into floats, keys by columns. Both ways round alike.

#pragma once

#include "simd.h"
#include "vectors.h"

namespace {

constexpr int64_t PART = 64;           // tokens
constexpr int64_t MAX_ROWS = 48;       // rows of queries that share one reading of the context
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t ROWS_BY_COLUMNS = 8;  // from this many rows on, turning a part pays

// Twin of compiled.py's _Pool: where the KV of a layer, side and head lies (core/layout.py).
struct Pool {
    uint8_t* raw;
    int64_t block_bytes, block_size, kv_heads, head_dim, scale_offset;
    int64_t format;  // of FORMATS

    uint8_t* elements(int64_t block, int64_t layer, int64_t side, int64_t head, int64_t token) const {
        const int64_t vector = ((layer * 2 + side) * kv_heads + head) * block_size + token;
        return raw + block * block_bytes + vector * head_dim * FORMATS[format].element_bytes;
    }
    uint16_t* scales(int64_t block, int64_t layer, int64_t side, int64_t head, int64_t token) const {
        const int64_t vector = ((layer * 2 + side) * kv_heads + head) * block_size + token;
        return reinterpret_cast<uint16_t*>(raw + block * block_bytes + scale_offset) + vector;
    }
    bool is_quantised() const { return FORMATS[format].has_scales; }
};

// Where the tokens of one part lie, keys or values of one layer and head.
struct Part {
    int64_t count = 0;  // tokens that exist
    const uint8_t* vectors[PART];
    alignas(64) float scales[PART];  // of a quantised pool
};

INLINE void find_part(const Pool& pool, const int32_t* table, int64_t layer, int64_t side, int64_t head, int64_t begin, int64_t count, Part& part) {
    part.count = count;
    const int64_t vector_bytes = pool.head_dim * FORMATS[pool.format].element_bytes;
    const float factor = pool.format == int64_t(Kv::E4M3) ? E4M3_FACTOR : 1.0f;
    for (int64_t i = 0; i < count;) {
        const int64_t token = (begin + i) % pool.block_size, here = std::min(count - i, pool.block_size - token);
        const int64_t block = table[(begin + i) / pool.block_size];
        const uint8_t* vectors = pool.elements(block, layer, side, head, token);
        const uint16_t* scales = pool.is_quantised() ? pool.scales(block, layer, side, head, token) : nullptr;
        for (int64_t j = 0; j < here; ++j) part.vectors[i + j] = vectors + j * vector_bytes;
        if (scales) {
            for (int64_t j = 0; j < here; j += 8) {  // a block has a multiple of 8
                const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + j)));
                _mm256_storeu_ps(part.scales + i + j, _mm256_mul_ps(wide, _mm256_set1_ps(factor)));
            }
        }
        i += here;
    }
    for (int64_t i = count; i < PART; ++i) {  // computed with, and masked
        part.vectors[i] = part.vectors[count - 1];
        part.scales[i] = 0.0f;
    }
}

INLINE void fetch_vector(const uint8_t* vector, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(vector + at), _MM_HINT_T0);
}

// What one thread needs beside its registers.
struct Scratch {
    alignas(64) float products[4][LANES][LANES];
    alignas(64) float scores[MAX_ROWS][PART];
    alignas(64) float keys[MAX_HEAD_DIM][PART];    // by columns
    alignas(64) float value_rows[PART * MAX_HEAD_DIM];
    alignas(64) float mixed_rows[MAX_ROWS * MAX_HEAD_DIM];
    float maximum[MAX_ROWS], weight[MAX_ROWS];
    int64_t seen[MAX_ROWS];  // tokens of the part, from its first
    Part key_part[2], value_part;
    int64_t head_dim;  // floats from one row to the next: a wider stride would press them into a few places of the cache

    float* values(int64_t i) { return value_rows + i * head_dim; }
    float* mixed(int64_t row) { return mixed_rows + row * head_dim; }
};

// One row's state over the parts so far.
struct Merged {
    float maximum, weight;  // of e^(score - maximum)
    float* mixed;           // [head_dim], weighted values
};

INLINE void merge(const Merged& into, float maximum, float weight, const float* mixed, int64_t head_dim, float& next_maximum, float& next_weight) {
    const float top = std::max(into.maximum, maximum);  // a NaN of the part is in its weight already
    const float keep = into.maximum == top ? 1.0f : exponential(into.maximum - top);
    const float take = maximum == top ? 1.0f : exponential(maximum - top);
    next_maximum = top;
    next_weight = into.weight * keep + weight * take;
    for (int64_t d = 0; d < head_dim; d += LANES) {
        store(into.mixed + d, fma(load(mixed + d), splat(take), _mm512_mul_ps(load(into.mixed + d), splat(keep))));
    }
}

// ---- Scores of rows by the lanes of each key: few rows

// Up to four rows, whose queries registers hold.
template <Kv FORMAT, int ROWS, int CHUNK, bool IS_FIRST>
INLINE void multiply_lanes(const float* const* queries, const Part& keys, int64_t group, int64_t at, float (*products)[LANES][LANES], const Part& next) {
    Floats query[ROWS][CHUNK];
    for (int row = 0; row < ROWS; ++row) for (int j = 0; j < CHUNK; ++j) query[row][j] = load(queries[row] + at + j * LANES);
    for (int64_t i = 0; i < LANES; ++i) {
        const uint8_t* key = keys.vectors[group * LANES + i] + at * KV_BYTES<FORMAT>;
        fetch_vector(next.vectors[group * LANES + i] + at * KV_BYTES<FORMAT>, CHUNK * LANES * KV_BYTES<FORMAT>);
        Floats wide[CHUNK];
        for (int j = 0; j < CHUNK; ++j) wide[j] = widen<FORMAT>(key + j * LANES * KV_BYTES<FORMAT>);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            float* product = products[row][i];
            Floats sum = IS_FIRST ? _mm512_mul_ps(query[row][0], wide[0]) : fma(query[row][0], wide[0], load(product));
            for (int j = 1; j < CHUNK; ++j) sum = fma(query[row][j], wide[j], sum);
            store(product, sum);
        }
    }
}

template <Kv FORMAT, int ROWS>
INLINE void score_lanes(const float* const* queries, int64_t first, int64_t head_dim, const Part& keys, Scratch& scratch, const Part& next) {
    const auto products = scratch.products;
    for (int64_t group = 0; group * LANES < keys.count; ++group) {
        int64_t at = 0;
        if (head_dim >= 4 * LANES) multiply_lanes<FORMAT, ROWS, 4, true>(queries + first, keys, group, 0, products, next), at = 4 * LANES;
        else multiply_lanes<FORMAT, ROWS, 1, true>(queries + first, keys, group, 0, products, next), at = LANES;
        for (; at + 4 * LANES <= head_dim; at += 4 * LANES) multiply_lanes<FORMAT, ROWS, 4, false>(queries + first, keys, group, at, products, next);
        for (; at < head_dim; at += LANES) multiply_lanes<FORMAT, ROWS, 1, false>(queries + first, keys, group, at, products, next);
        for (int row = 0; row < ROWS; ++row) store(scratch.scores[first + row] + group * LANES, sums(products[row][0], LANES));
    }
}

// Meanwhile the vectors of `next` are fetched.
template <Kv FORMAT>
void score_by_lanes(const float* const* queries, int64_t rows, int64_t head_dim, const Part& keys, Scratch& scratch, const Part& next) {
    for (int64_t first = 0; first < rows; first += 4) {
        switch (std::min<int64_t>(4, rows - first)) {
            case 1: score_lanes<FORMAT, 1>(queries, first, head_dim, keys, scratch, next); break;
            case 2: score_lanes<FORMAT, 2>(queries, first, head_dim, keys, scratch, next); break;
            case 3: score_lanes<FORMAT, 3>(queries, first, head_dim, keys, scratch, next); break;
            case 4: score_lanes<FORMAT, 4>(queries, first, head_dim, keys, scratch, next); break;
        }
    }
}

// ---- Scores of rows by columns of keys: many rows

// 16 x 16 floats, rows into columns.
INLINE void transpose(Floats x[LANES]) {
    Floats y[LANES];
    for (int i = 0; i < LANES; i += 2) y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    for (int i = 0; i < LANES; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const Floats a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xDD);
        const Floats c = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xDD);
        y[i] = _mm512_shuffle_f32x4(a, c, 0x88), y[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
        y[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88), y[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
    for (int i = 0; i < LANES; ++i) x[i] = y[i];
}

template <Kv FORMAT> void turn_part(const Part& keys, const Part& values, int64_t head_dim, Scratch& scratch) {
    for (int64_t group = 0; group * LANES < keys.count; ++group) {
        for (int64_t at = 0; at < head_dim; at += LANES) {
            Floats tile[LANES];
            for (int64_t i = 0; i < LANES; ++i) tile[i] = widen<FORMAT>(keys.vectors[group * LANES + i] + at * KV_BYTES<FORMAT>);
            transpose(tile);
            for (int64_t i = 0; i < LANES; ++i) store(&scratch.keys[at + i][group * LANES], tile[i]);
        }
    }
    for (int64_t i = 0; i < values.count; ++i) {
        for (int64_t at = 0; at < head_dim; at += LANES) store(scratch.values(i) + at, widen<FORMAT>(values.vectors[i] + at * KV_BYTES<FORMAT>));
    }
}

// Lane l of what `multiply_lanes` computes, for ROWS rows and GROUPS times 16 tokens.
template <int ROWS, int GROUPS>
INLINE void lane(const float* const* queries, int64_t head_dim, const float* keys, int64_t l, Floats (*out)[GROUPS]) {
    for (int row = 0; row < ROWS; ++row) {
        for (int group = 0; group < GROUPS; ++group) out[row][group] = _mm512_mul_ps(splat(queries[row][l]), load(keys + l * PART + group * LANES));
    }
    for (int64_t at = l + LANES; at < head_dim; at += LANES) {
        Floats key[GROUPS];
        for (int group = 0; group < GROUPS; ++group) key[group] = load(keys + at * PART + group * LANES);
        for (int row = 0; row < ROWS; ++row) {
            const Floats query = splat(queries[row][at]);
            for (int group = 0; group < GROUPS; ++group) out[row][group] = fma(query, key[group], out[row][group]);
        }
    }
}

// The sum of lanes first, first + STRIDE, ...: in the order of `sum`, its last additions first.
template <int ROWS, int GROUPS, int STRIDE>
INLINE void lanes(const float* const* queries, int64_t head_dim, const float* keys, int64_t first, Floats (*out)[GROUPS]) {
    if constexpr (STRIDE == LANES) {
        lane<ROWS, GROUPS>(queries, head_dim, keys, first, out);
    } else {
        Floats other[ROWS][GROUPS];
        lanes<ROWS, GROUPS, 2 * STRIDE>(queries, head_dim, keys, first, out);
        lanes<ROWS, GROUPS, 2 * STRIDE>(queries, head_dim, keys, first + STRIDE, other);
        for (int row = 0; row < ROWS; ++row) {
            for (int group = 0; group < GROUPS; ++group) out[row][group] = _mm512_add_ps(out[row][group], other[row][group]);
        }
    }
}

template <int ROWS, int GROUPS> INLINE void score_rows(const float* const* queries, int64_t head_dim, int64_t first, int64_t token, Scratch& scratch) {
    Floats out[ROWS][GROUPS];
    lanes<ROWS, GROUPS, 1>(queries + first, head_dim, &scratch.keys[0][token], 0, out);
    for (int row = 0; row < ROWS; ++row) {
        for (int group = 0; group < GROUPS; ++group) store(scratch.scores[first + row] + token + group * LANES, out[row][group]);
    }
}

void score_by_columns(const float* const* queries, int64_t rows, int64_t head_dim, int64_t count, Scratch& scratch) {
    for (int64_t token = 0; token < count; token += 2 * LANES) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) score_rows<4, 2>(queries, head_dim, row, token, scratch);
        for (; row < rows; ++row) score_rows<1, 2>(queries, head_dim, row, token, scratch);
    }
}

// ---- Scores into weights, and weighted values

// Row's scores of tokens [low, high) of the part become e^(score - maximum), the others 0; its maximum and sum are kept.
INLINE void weigh(int64_t row, int64_t low, int64_t high, int64_t count, const Part& keys, bool has_scales, Scratch& scratch) {
    float* scores = scratch.scores[row];
    const int64_t groups = (count + LANES - 1) / LANES;
    const auto mask = [&](int64_t group) {
        const int64_t from = std::clamp<int64_t>(low - group * LANES, 0, LANES), to = std::clamp<int64_t>(high - group * LANES, 0, LANES);
        return __mmask16(((1u << to) - 1) & ~((1u << from) - 1));
    };
    Floats top = splat(-INFINITY);
    for (int64_t group = 0; group < groups; ++group) {
        Floats x = load(scores + group * LANES);
        if (has_scales) {
            x = _mm512_mul_ps(x, load(keys.scales + group * LANES));
            store(scores + group * LANES, x);
        }
        top = _mm512_mask_max_ps(top, mask(group), top, x);
    }
    const float maximum = largest(top);
    Floats weight = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
        const Floats x = _mm512_maskz_mov_ps(mask(group), exponential(_mm512_sub_ps(load(scores + group * LANES), splat(maximum))));
        store(scores + group * LANES, x);
        weight = _mm512_add_ps(weight, x);
    }
    scratch.seen[row] = std::clamp<int64_t>(high, 0, count);
    scratch.maximum[row] = maximum;
    scratch.weight[row] = sum(weight);
}

// A row takes only values that it may see: a weight of zero does not hide the NaN of a later token, which may be a wrong draft's.
template <Kv FORMAT, int ROWS, int CHUNK>
INLINE void mix_tile(int64_t first, int64_t at, const Part& values, bool is_turned, Scratch& scratch, const Part& next) {
    Floats sum[ROWS][CHUNK], value[CHUNK];
    for (int row = 0; row < ROWS; ++row) for (int j = 0; j < CHUNK; ++j) sum[row][j] = _mm512_setzero_ps();
    const auto read = [&](int64_t i) __attribute__((always_inline)) {
        for (int j = 0; j < CHUNK; ++j) {
            value[j] = is_turned ? load(scratch.values(i) + at + j * LANES) : widen<FORMAT>(values.vectors[i] + (at + j * LANES) * KV_BYTES<FORMAT>);
        }
    };
    const int64_t common = scratch.seen[first];  // later rows see as much or more
    for (int64_t i = 0; i < common; ++i) {
        if (!is_turned) fetch_vector(next.vectors[i] + at * KV_BYTES<FORMAT>, CHUNK * LANES * KV_BYTES<FORMAT>);
        read(i);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; ++row) {
            const Floats weight = splat(scratch.scores[first + row][i]);
            for (int j = 0; j < CHUNK; ++j) sum[row][j] = fma(weight, value[j], sum[row][j]);
        }
    }
#pragma GCC unroll 6
    for (int row = 1; row < ROWS; ++row) {
        for (int64_t i = common; i < scratch.seen[first + row]; ++i) {
            read(i);
            for (int j = 0; j < CHUNK; ++j) sum[row][j] = fma(splat(scratch.scores[first + row][i]), value[j], sum[row][j]);
        }
    }
    for (int row = 0; row < ROWS; ++row) for (int j = 0; j < CHUNK; ++j) store(scratch.mixed(first + row) + at + j * LANES, sum[row][j]);
}

template <Kv FORMAT, int CHUNK> INLINE void mix_rows(int64_t rows, int64_t at, const Part& values, bool is_turned, Scratch& scratch, const Part& next) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) mix_tile<FORMAT, 6, CHUNK>(row, at, values, is_turned, scratch, next);
    switch (rows - row) {
        case 1: return mix_tile<FORMAT, 1, CHUNK>(row, at, values, is_turned, scratch, next);
        case 2: return mix_tile<FORMAT, 2, CHUNK>(row, at, values, is_turned, scratch, next);
        case 3: return mix_tile<FORMAT, 3, CHUNK>(row, at, values, is_turned, scratch, next);
        case 4: return mix_tile<FORMAT, 4, CHUNK>(row, at, values, is_turned, scratch, next);
        case 5: return mix_tile<FORMAT, 5, CHUNK>(row, at, values, is_turned, scratch, next);
    }
}

// Meanwhile, where values are read as they lie, the vectors of `next` are fetched.
template <Kv FORMAT> void mix(int64_t rows, int64_t head_dim, const Part& values, bool is_turned, Scratch& scratch, const Part& next) {
    if (FORMATS[int64_t(FORMAT)].has_scales) {
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t at = 0; at < PART; at += LANES) {
                store(scratch.scores[row] + at, _mm512_mul_ps(load(scratch.scores[row] + at), load(values.scales + at)));
            }
        }
    }
    int64_t at = 0;
    for (; at + 4 * LANES <= head_dim; at += 4 * LANES) mix_rows<FORMAT, 4>(rows, at, values, is_turned, scratch, next);
    for (; at < head_dim; at += LANES) mix_rows<FORMAT, 1>(rows, at, values, is_turned, scratch, next);
}

// ---- A task: some rows, one head, some parts

// Rows are query heads of a group within tokens: token begin_token + row / group. Result: for each part `maximum`, `weight`, `mixed`.
struct Attention {
    const Pool& pool;
    const int32_t* table;
    int64_t layer, head, group;
    int64_t context;           // tokens of the sequence that have KV after this step
    int64_t first_position;    // of the first row's token
    int64_t window;            // tokens that a token sees at most
    int64_t rows;
    const float* queries[MAX_ROWS];  // scaled

    int64_t position(int64_t row) const { return first_position + row / group; }
    int64_t low(int64_t row) const { return std::max<int64_t>(0, position(row) - window + 1); }
};

INLINE int64_t part_size(const Attention& task, int64_t part) { return std::min(PART, task.context - part * PART); }

template <Kv FORMAT> void attend_part(const Attention& task, int64_t part, const Part& keys, const Part& next_keys, Scratch& scratch) {
    const int64_t begin = part * PART, head_dim = task.pool.head_dim;
    const bool is_turned = task.rows >= ROWS_BY_COLUMNS, has_scales = FORMATS[int64_t(FORMAT)].has_scales;
    Part& values = scratch.value_part;
    find_part(task.pool, task.table, task.layer, 1, task.head, begin, keys.count, values);
    if (is_turned) {
        turn_part<FORMAT>(keys, values, head_dim, scratch);
        score_by_columns(task.queries, task.rows, head_dim, keys.count, scratch);
    } else {
        score_by_lanes<FORMAT>(task.queries, task.rows, head_dim, keys, scratch, values);
    }
    for (int64_t row = 0; row < task.rows; ++row) {
        weigh(row, task.low(row) - begin, task.position(row) + 1 - begin, keys.count, keys, has_scales, scratch);
    }
    mix<FORMAT>(task.rows, head_dim, values, is_turned, scratch, next_keys);
}

// Parts [begin, end) in order: done(part) after each, with the results in `scratch`.
template <Kv FORMAT, class Done> INLINE void attend_parts(const Attention& task, int64_t begin, int64_t end, Scratch& scratch, Done done) {
    const auto find = [&](int64_t part) {
        find_part(task.pool, task.table, task.layer, 0, task.head, part * PART, part_size(task, part), scratch.key_part[part % 2]);
    };
    if (begin < end) find(begin);
    for (int64_t part = begin; part < end; ++part) {
        if (part + 1 < end) find(part + 1);
        const Part& keys = scratch.key_part[part % 2];
        attend_part<FORMAT>(task, part, keys, part + 1 < end ? scratch.key_part[(part + 1) % 2] : keys, scratch);
        done(part);
    }
}

}  // namespace
