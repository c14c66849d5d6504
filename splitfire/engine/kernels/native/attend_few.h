// Attention of few rows: sixteen tokens in the lanes. Keys are turned into columns, values are read as they lie.

#pragma once

#include "attend.h"

namespace {

// Lines that are fetched while 64 bytes of sixteen vectors are turned, with each element of a score, and with each value.
constexpr int64_t TURN_LINES = 8, SCORE_LINES = 1, MIX_LINES = 2;

// Elements of sixteen vectors from `at` on, up to TURNED of them, into columns of PART floats. 32 bits of a vector are moved at a time, whatever they hold.
template <Kv FORMAT> constexpr int64_t TURNED = FORMAT == Kv::BF16 ? 32 : FORMAT == Kv::INT8 ? 64 : 16;

//
// DOTS: a column has two elements of a vector, in bf16.
template <Kv FORMAT, bool DOTS> INLINE void turn(const uint8_t* const* vectors, int64_t at, int64_t head_dim, float* columns) {
    Floats x[LANES];
    if constexpr (FORMAT == Kv::BF16 || FORMAT == Kv::INT8) {
        const int64_t words = std::min(TURNED<FORMAT>, head_dim - at) * KV_BYTES<FORMAT> / 4;
        const __mmask16 there = __mmask16((1u << words) - 1);
        for (int i = 0; i < LANES; ++i) x[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(there, vectors[i] + at * KV_BYTES<FORMAT>));
    } else {
        for (int i = 0; i < LANES; ++i) x[i] = widen<FORMAT>(vectors[i] + at * KV_BYTES<FORMAT>);
    }
    transpose(x);
    constexpr int64_t ELEMENTS = FORMAT == Kv::BF16 ? 2 : FORMAT == Kv::INT8 ? 4 : 1;  // in a word
    const auto put = [&](int64_t element, Floats first, Floats second) __attribute__((always_inline)) {
        if constexpr (DOTS) {
            store(columns + element / 2 * PART, join_pairs(first, second));
        } else {
            store(columns + element * PART, first);
            store(columns + (element + 1) * PART, second);
        }
    };
    const auto part = [](__m512i word, int left) __attribute__((always_inline)) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, left), 24)); };
    for (int i = 0; i < LANES; i += ELEMENTS == 1 ? 2 : 1) {
        const __m512i word = _mm512_castps_si512(x[i]);
        if constexpr (FORMAT == Kv::BF16 && DOTS) {
            store(columns + i * PART, x[i]);
        } else if constexpr (FORMAT == Kv::BF16) {
            Floats even, odd;
            split_bf16(word, even, odd);
            put(2 * i, even, odd);
        } else if constexpr (FORMAT == Kv::INT8) {
            put(4 * i, part(word, 24), part(word, 16));
            put(4 * i + 2, part(word, 8), part(word, 0));
        } else {
            put(i, x[i], x[i + 1]);
        }
    }
}

template <bool DOTS> constexpr int64_t WORD_ELEMENTS = DOTS ? 2 : 1;  // of queries and turned keys

template <Kv FORMAT, bool DOTS> void turn_keys(const Part& keys, int64_t head_dim, float* columns, Fetcher& fetcher) {
    for (int64_t token = 0; token < keys.count; token += LANES) {
        for (int64_t at = 0; at < head_dim; at += TURNED<FORMAT>) {
            fetcher.fetch(TURN_LINES);
            turn<FORMAT, DOTS>(keys.vectors + token, at, head_dim, columns + at / WORD_ELEMENTS<DOTS> * PART + token);
        }
    }
}

template <bool DOTS, int ROWS> INLINE void score_rows(const float* const* queries, int64_t head_dim, const float* columns, float* scores, Fetcher& fetcher) {
    constexpr int GROUPS = PART / LANES;
    Floats sum[ROWS][GROUPS];
    for (int row = 0; row < ROWS; ++row) for (int group = 0; group < GROUPS; ++group) sum[row][group] = _mm512_setzero_ps();
    for (int64_t at = 0; at < head_dim / WORD_ELEMENTS<DOTS>; ++at) {
        fetcher.fetch(SCORE_LINES * WORD_ELEMENTS<DOTS>);
        Floats key[GROUPS];
        for (int group = 0; group < GROUPS; ++group) key[group] = load(columns + at * PART + group * LANES);
        for (int row = 0; row < ROWS; ++row) {
            const Floats query = splat(queries[row][at]);
            for (int group = 0; group < GROUPS; ++group) {
                sum[row][group] = DOTS ? dot(sum[row][group], query, key[group]) : fma(query, key[group], sum[row][group]);
            }
        }
    }
    for (int row = 0; row < ROWS; ++row) for (int group = 0; group < GROUPS; ++group) store(scores + row * PART + group * LANES, sum[row][group]);
}

template <bool DOTS> void score_few(const Attention& task, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim;
    for (int64_t row = 0; row < task.rows; row += 4) {
        const float* const* queries = task.queries + row;
        float* scores = scratch.scores + row * PART;
        switch (std::min<int64_t>(4, task.rows - row)) {
            case 1: score_rows<DOTS, 1>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
            case 2: score_rows<DOTS, 2>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
            case 3: score_rows<DOTS, 3>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
            case 4: score_rows<DOTS, 4>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
        }
    }
}

// A row's scores of tokens [low, high) of the part become e^(score - maximum), the others 0; with DOTS in bf16.
template <bool DOTS> INLINE Merged weigh_row(float* scores, int64_t low, int64_t high, const Part& keys, const Part& values, bool has_scales) {
    const int64_t groups = (keys.count + LANES - 1) / LANES;
    const auto mask = [&](int64_t group) {
        const int64_t from = std::clamp<int64_t>(low - group * LANES, 0, LANES), to = std::clamp<int64_t>(high - group * LANES, 0, LANES);
        return __mmask16(((1u << to) - 1) & ~((1u << from) - 1));
    };
    Floats top = splat(-INFINITY), weight = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
        Floats x = load(scores + group * LANES);
        if (has_scales) {
            x = _mm512_mul_ps(x, load(keys.scales + group * LANES));
            store(scores + group * LANES, x);
        }
        top = _mm512_mask_max_ps(top, mask(group), top, x);
    }
    const float maximum = largest(top);
    for (int64_t group = 0; group < groups; ++group) {
        const Floats below = _mm512_sub_ps(load(scores + group * LANES), splat(maximum));
        Floats x = _mm512_maskz_mov_ps(mask(group), DOTS ? exponential_to_round(below) : exponential(below));
        weight = _mm512_add_ps(weight, x);
        if (has_scales) x = _mm512_maskz_mul_ps(mask(group), x, load(values.scales + group * LANES));  // a scale may be NaN
        if constexpr (DOTS) store_narrow(reinterpret_cast<uint16_t*>(scores) + group * LANES, x);
        else store(scores + group * LANES, x);
    }
    return {maximum, sum(weight)};
}

// A row takes only values that it may see: a weight of zero does not hide the NaN of a later token, which may be a wrong draft's.
template <Kv FORMAT, int ROWS, int CHUNK>
INLINE void mix_rows(const int64_t* seen, int64_t at, int64_t head_dim, const Part& values, const float* scores, float* mixed, Fetcher& fetcher) {
    Floats sum[ROWS][CHUNK], value[CHUNK];
    for (int row = 0; row < ROWS; ++row) for (int j = 0; j < CHUNK; ++j) sum[row][j] = _mm512_setzero_ps();
    constexpr bool IS_SPLIT = FORMAT == Kv::BF16 && CHUNK % 2 == 0;  // into even and odd elements, which takes half of what widening takes
    const auto read = [&](int64_t i) __attribute__((always_inline)) {
        const uint8_t* from = values.vectors[i] + at * KV_BYTES<FORMAT>;
        if constexpr (IS_SPLIT) {
            for (int j = 0; j < CHUNK; j += 2) split_bf16(_mm512_loadu_si512(from + j * LANES * KV_BYTES<FORMAT>), value[j], value[j + 1]);
        } else {
            for (int j = 0; j < CHUNK; ++j) value[j] = widen<FORMAT>(from + j * LANES * KV_BYTES<FORMAT>);
        }
    };
    for (int64_t i = 0; i < seen[0]; ++i) {  // later rows see as much or more
        fetcher.fetch(MIX_LINES);
        read(i);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const Floats weight = splat(scores[row * PART + i]);
            for (int j = 0; j < CHUNK; ++j) sum[row][j] = fma(weight, value[j], sum[row][j]);
        }
    }
#pragma GCC unroll 4
    for (int row = 1; row < ROWS; ++row) {
        for (int64_t i = seen[0]; i < seen[row]; ++i) {
            read(i);
            for (int j = 0; j < CHUNK; ++j) sum[row][j] = fma(splat(scores[row * PART + i]), value[j], sum[row][j]);
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        if constexpr (IS_SPLIT) for (int j = 0; j < CHUNK; j += 2) interleave(sum[row][j], sum[row][j + 1]);
        for (int j = 0; j < CHUNK; ++j) store(mixed + row * head_dim + at + j * LANES, sum[row][j]);
    }
}

// As mix_rows, two tokens at a time; where a row sees only the first of them, the second's values are zeros.
template <Kv FORMAT, int ROWS, int CHUNK>
INLINE void mix_row_pairs(const int64_t* seen, int64_t at, int64_t head_dim, const Part& values, const float* scores, float* mixed, Fetcher& fetcher) {
    Floats sum[ROWS][CHUNK], value[CHUNK];
    for (int row = 0; row < ROWS; ++row) for (int j = 0; j < CHUNK; ++j) sum[row][j] = _mm512_setzero_ps();
    constexpr bool IS_SPLIT = FORMAT == Kv::BF16 && CHUNK % 2 == 0;  // in each quarter of 32 elements those of its lower and of its upper half
    const auto read = [&](int64_t i) __attribute__((always_inline)) {
        const uint8_t *first = values.vectors[i] + at * KV_BYTES<FORMAT>, *second = values.vectors[i + 1] + at * KV_BYTES<FORMAT>;
        for (int j = 0; j < CHUNK; j += IS_SPLIT ? 2 : 1) {
            const int64_t offset = j * LANES * KV_BYTES<FORMAT>;
            if constexpr (IS_SPLIT) {
                const __m512i a = _mm512_loadu_si512(first + offset), b = _mm512_loadu_si512(second + offset);
                value[j] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b)), value[j + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
            } else {
                value[j] = pair_up<FORMAT>(first + offset, second + offset);
            }
        }
    };
    const int64_t common = seen[0] / 2 * 2;
    for (int64_t i = 0; i < common; i += 2) {
        fetcher.fetch(2 * MIX_LINES);
        read(i);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const Floats weight = splat(scores[row * PART + i / 2]);
            for (int j = 0; j < CHUNK; ++j) sum[row][j] = dot(sum[row][j], weight, value[j]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
        for (int64_t i = common; i < seen[row]; i += 2) {
            read(i);
            const Floats there = _mm512_castsi512_ps(_mm512_set1_epi32(i + 1 < seen[row] ? -1 : 0xFFFF)), weight = splat(scores[row * PART + i / 2]);
            for (int j = 0; j < CHUNK; ++j) sum[row][j] = dot(sum[row][j], weight, _mm512_and_ps(value[j], there));
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        if constexpr (IS_SPLIT) for (int j = 0; j < CHUNK; j += 2) merge_quarters(sum[row][j], sum[row][j + 1]);
        for (int j = 0; j < CHUNK; ++j) store(mixed + row * head_dim + at + j * LANES, sum[row][j]);
    }
}

template <Kv FORMAT, bool DOTS, int ROWS, int CHUNK>
INLINE void mix_chunk(const int64_t* seen, int64_t at, int64_t head_dim, const Part& values, const float* scores, float* mixed, Fetcher& fetcher) {
    if constexpr (DOTS) mix_row_pairs<FORMAT, ROWS, CHUNK>(seen, at, head_dim, values, scores, mixed, fetcher);
    else mix_rows<FORMAT, ROWS, CHUNK>(seen, at, head_dim, values, scores, mixed, fetcher);
}

template <Kv FORMAT, bool DOTS, int ROWS> INLINE void mix_all(const int64_t* seen, int64_t head_dim, const Part& values, const float* scores, float* mixed, Fetcher& fetcher) {
    int64_t at = 0;
    for (; at + 4 * LANES <= head_dim; at += 4 * LANES) mix_chunk<FORMAT, DOTS, ROWS, 4>(seen, at, head_dim, values, scores, mixed, fetcher);
    for (; at < head_dim; at += LANES) mix_chunk<FORMAT, DOTS, ROWS, 1>(seen, at, head_dim, values, scores, mixed, fetcher);
}

template <Kv FORMAT, bool DOTS> void mix_few(const Attention& task, int64_t begin, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim;
    int64_t seen[MAX_ROWS];
    for (int64_t row = 0; row < task.rows; ++row) seen[row] = task.seen(row, begin);
    for (int64_t row = 0; row < task.rows; row += 4) {
        const float* scores = scratch.scores + row * PART;
        float* mixed = scratch.mixed + row * head_dim;
        switch (std::min<int64_t>(4, task.rows - row)) {
            case 1: mix_all<FORMAT, DOTS, 1>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
            case 2: mix_all<FORMAT, DOTS, 2>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
            case 3: mix_all<FORMAT, DOTS, 3>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
            case 4: mix_all<FORMAT, DOTS, 4>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
        }
    }
}

template <Kv FORMAT, bool DOTS> void attend_few(const Attention& task, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim;
    const bool has_scales = task.context.pool->is_quantised();
    Merged states[MAX_ROWS];
    for (int64_t part = task.first_part; part < task.end_part; ++part) {
        const int64_t begin = part * PART;
        const Part& keys = scratch.key_part;
        task.context.find(KEYS, part, scratch.key_part);
        task.context.find(VALUES, part, scratch.value_part);
        task.fetch_next(part, scratch.fetcher);
        turn_keys<FORMAT, DOTS>(keys, head_dim, scratch.keys, scratch.fetcher);
        score_few<DOTS>(task, scratch);
        Merged weighed[MAX_ROWS];
        for (int64_t row = 0; row < task.rows; ++row) {
            weighed[row] = weigh_row<DOTS>(scratch.scores + row * PART, task.low(row) - begin, task.seen(row, begin), keys, scratch.value_part, has_scales);
        }
        mix_few<FORMAT, DOTS>(task, begin, scratch);
        scratch.fetcher.fetch_rest();
        for (int64_t row = 0; row < task.rows; ++row) {
            const auto& [maximum, weight] = weighed[row];
            const float* mixed = scratch.mixed + row * head_dim;
            if (!task.partials) {
                take(task.results[row], states[row], maximum, weight, mixed, head_dim);
                continue;
            }
            float* to = task.partial(part, row);
            to[0] = maximum, to[1] = weight;
            std::memcpy(to + 2, mixed, size_t(head_dim) * sizeof(float));
        }
    }
    if (!task.partials) for (int64_t row = 0; row < task.rows; ++row) divide_by(task.results[row], states[row].weight, head_dim);
}

}  // namespace
