// Attention of few rows: sixteen tokens in the lanes. Keys are turned into columns, values are read as they lie.

#pragma once

#include "attend.h"

namespace {

// Lines that are fetched while 64 bytes of sixteen vectors are turned, with each element of a score, and with each value.
constexpr int64_t TURN_LINES = 8, SCORE_LINES = 1, MIX_LINES = 2;

// Elements of sixteen vectors from `at` on, up to TURNED of them, into columns of PART floats. 32 bits of a vector are moved at a time, whatever they hold.
template <Kv FORMAT> constexpr int64_t TURNED = FORMAT == Kv::BF16 ? 32 : FORMAT == Kv::INT8 ? 64 : 16;

template <Kv FORMAT> INLINE void turn(const uint8_t* const* vectors, int64_t at, int64_t head_dim, float* columns) {
    Floats x[LANES];
    if constexpr (FORMAT == Kv::BF16 || FORMAT == Kv::INT8) {
        const int64_t words = std::min(TURNED<FORMAT>, head_dim - at) * KV_BYTES<FORMAT> / 4;
        const __mmask16 there = __mmask16((1u << words) - 1);
        for (int i = 0; i < LANES; ++i) x[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(there, vectors[i] + at * KV_BYTES<FORMAT>));
    } else {
        for (int i = 0; i < LANES; ++i) x[i] = widen<FORMAT>(vectors[i] + at * KV_BYTES<FORMAT>);
    }
    transpose(x);
    for (int i = 0; i < LANES; ++i) {
        const __m512i word = _mm512_castps_si512(x[i]);
        if constexpr (FORMAT == Kv::BF16) {
            Floats even, odd;
            split_bf16(word, even, odd);
            store(columns + 2 * i * PART, even);
            store(columns + (2 * i + 1) * PART, odd);
        } else if constexpr (FORMAT == Kv::INT8) {
            store(columns + 4 * i * PART, _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 24), 24)));
            store(columns + (4 * i + 1) * PART, _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 16), 24)));
            store(columns + (4 * i + 2) * PART, _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 8), 24)));
            store(columns + (4 * i + 3) * PART, _mm512_cvtepi32_ps(_mm512_srai_epi32(word, 24)));
        } else {
            store(columns + i * PART, x[i]);
        }
    }
}

template <Kv FORMAT> void turn_keys(const Part& keys, int64_t head_dim, float* columns, Fetcher& fetcher) {
    for (int64_t token = 0; token < keys.count; token += LANES) {
        for (int64_t at = 0; at < head_dim; at += TURNED<FORMAT>) {
            fetcher.fetch(TURN_LINES);
            turn<FORMAT>(keys.vectors + token, at, head_dim, columns + at * PART + token);
        }
    }
}

template <int ROWS> INLINE void score_rows(const float* const* queries, int64_t head_dim, const float* columns, float* scores, Fetcher& fetcher) {
    constexpr int GROUPS = PART / LANES;
    Floats sum[ROWS][GROUPS];
    for (int row = 0; row < ROWS; ++row) for (int group = 0; group < GROUPS; ++group) sum[row][group] = _mm512_setzero_ps();
    for (int64_t at = 0; at < head_dim; ++at) {
        fetcher.fetch(SCORE_LINES);
        Floats key[GROUPS];
        for (int group = 0; group < GROUPS; ++group) key[group] = load(columns + at * PART + group * LANES);
        for (int row = 0; row < ROWS; ++row) {
            const Floats query = splat(queries[row][at]);
            for (int group = 0; group < GROUPS; ++group) sum[row][group] = fma(query, key[group], sum[row][group]);
        }
    }
    for (int row = 0; row < ROWS; ++row) for (int group = 0; group < GROUPS; ++group) store(scores + row * PART + group * LANES, sum[row][group]);
}

void score_few(const Attention& task, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim;
    for (int64_t row = 0; row < task.rows; row += 4) {
        const float* const* queries = task.queries + row;
        float* scores = scratch.scores + row * PART;
        switch (std::min<int64_t>(4, task.rows - row)) {
            case 1: score_rows<1>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
            case 2: score_rows<2>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
            case 3: score_rows<3>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
            case 4: score_rows<4>(queries, head_dim, scratch.keys, scores, scratch.fetcher); break;
        }
    }
}

// A row's scores of tokens [low, high) of the part become e^(score - maximum), the others 0.
INLINE Merged weigh_row(float* scores, int64_t low, int64_t high, const Part& keys, const Part& values, bool has_scales) {
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
        Floats x = _mm512_maskz_mov_ps(mask(group), exponential(_mm512_sub_ps(load(scores + group * LANES), splat(maximum))));
        weight = _mm512_add_ps(weight, x);
        if (has_scales) x = _mm512_mul_ps(x, load(values.scales + group * LANES));
        store(scores + group * LANES, x);
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

template <Kv FORMAT, int ROWS> INLINE void mix_all(const int64_t* seen, int64_t head_dim, const Part& values, const float* scores, float* mixed, Fetcher& fetcher) {
    int64_t at = 0;
    for (; at + 4 * LANES <= head_dim; at += 4 * LANES) mix_rows<FORMAT, ROWS, 4>(seen, at, head_dim, values, scores, mixed, fetcher);
    for (; at < head_dim; at += LANES) mix_rows<FORMAT, ROWS, 1>(seen, at, head_dim, values, scores, mixed, fetcher);
}

template <Kv FORMAT> void mix_few(const Attention& task, int64_t begin, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim;
    int64_t seen[MAX_ROWS];
    for (int64_t row = 0; row < task.rows; ++row) seen[row] = task.seen(row, begin);
    for (int64_t row = 0; row < task.rows; row += 4) {
        const float* scores = scratch.scores + row * PART;
        float* mixed = scratch.mixed + row * head_dim;
        switch (std::min<int64_t>(4, task.rows - row)) {
            case 1: mix_all<FORMAT, 1>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
            case 2: mix_all<FORMAT, 2>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
            case 3: mix_all<FORMAT, 3>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
            case 4: mix_all<FORMAT, 4>(seen + row, head_dim, scratch.value_part, scores, mixed, scratch.fetcher); break;
        }
    }
}

template <Kv FORMAT> void attend_few(const Attention& task, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim;
    const bool has_scales = task.context.pool->is_quantised();
    Merged states[MAX_ROWS];
    for (int64_t part = task.first_part; part < task.end_part; ++part) {
        const int64_t begin = part * PART;
        const Part& keys = scratch.key_part;
        task.context.find(KEYS, part, scratch.key_part);
        task.context.find(VALUES, part, scratch.value_part);
        task.fetch_next(part, scratch.fetcher);
        turn_keys<FORMAT>(keys, head_dim, scratch.keys, scratch.fetcher);
        score_few(task, scratch);
        Merged weighed[MAX_ROWS];
        for (int64_t row = 0; row < task.rows; ++row) {
            weighed[row] = weigh_row(scratch.scores + row * PART, task.low(row) - begin, task.seen(row, begin), keys, scratch.value_part, has_scales);
        }
        mix_few<FORMAT>(task, begin, scratch);
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
