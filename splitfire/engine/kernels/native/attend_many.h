// Attention of many rows: sixteen rows in the lanes, so that nothing is added up across them and no key is turned.

#pragma once

#include "attend_few.h"

namespace {

constexpr int VECTORS = MAX_ROWS / LANES;
constexpr int64_t STRIDE = MAX_ROWS;  // floats from one token or element to the next
constexpr int64_t TILE_TOKENS = 8;  // of scores: with three vectors of rows 24 registers of sums
constexpr int64_t TILE_DIMS = 8;    // of weighted values, likewise

// The rows of a task as vectors of sixteen lanes; what those compute that are no rows is dropped.
struct Crowd {
    __m512i low[VECTORS], seen[VECTORS];                // tokens of the part that a row sees: from, up to
    bool sees_all = false;
    Floats maximum[VECTORS], weight[VECTORS];              // of the part
    Floats total_maximum[VECTORS], total_weight[VECTORS];  // of the parts so far
    Floats keep[VECTORS], add[VECTORS];                    // factors of the parts so far and of this one
    __mmask16 is_blind[VECTORS], is_first[VECTORS];        // rows that take nothing of it, and those that had nothing
    bool is_plain = false;                                 // neither

    Crowd() {
        for (int v = 0; v < VECTORS; ++v) total_maximum[v] = splat(-INFINITY), total_weight[v] = _mm512_setzero_ps();
    }

    void begin(const Attention& task, int64_t begin) {
        const int64_t count = task.context.part_size(begin / PART);
        sees_all = task.low(task.rows - 1) <= begin && task.seen(0, begin) == count;
        if (sees_all) {  // as nearly always: no row needs to be looked at
            for (int v = 0; v < VECTORS; ++v) low[v] = _mm512_setzero_si512(), seen[v] = _mm512_set1_epi32(int32_t(count));
            return;
        }
        alignas(64) int32_t from[STRIDE] = {}, to[STRIDE] = {};
        for (int64_t row = 0; row < task.rows; ++row) {
            from[row] = int32_t(std::clamp<int64_t>(task.low(row) - begin, 0, PART)), to[row] = int32_t(task.seen(row, begin));
        }
        for (int v = 0; v < VECTORS; ++v) low[v] = _mm512_load_si512(from + v * LANES), seen[v] = _mm512_load_si512(to + v * LANES);
    }

    __mmask16 sees_before(int v, int64_t token) const { return _mm512_cmplt_epi32_mask(_mm512_set1_epi32(int32_t(token)), seen[v]); }
    __mmask16 sees(int v, int64_t token) const { return _mm512_mask_cmple_epi32_mask(sees_before(v, token), low[v], _mm512_set1_epi32(int32_t(token))); }

    // What attend.h's `take` does with maximum and weight.
    void take() {
        is_plain = true;
        for (int v = 0; v < VECTORS; ++v) {
            const Floats none = splat(-INFINITY), one = splat(1.0f), top = _mm512_max_ps(maximum[v], total_maximum[v]);
            is_blind[v] = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(maximum[v], none, _CMP_EQ_OQ), weight[v], weight[v], _CMP_ORD_Q);
            is_first[v] = __mmask16(_mm512_cmp_ps_mask(total_maximum[v], none, _CMP_EQ_OQ) & ~is_blind[v]);
            is_plain &= !(is_blind[v] | is_first[v]);
            keep[v] = _mm512_mask_mov_ps(exponential(_mm512_sub_ps(total_maximum[v], top)), _mm512_cmp_ps_mask(total_maximum[v], top, _CMP_EQ_OQ), one);
            add[v] = _mm512_mask_mov_ps(exponential(_mm512_sub_ps(maximum[v], top)), _mm512_cmp_ps_mask(maximum[v], top, _CMP_EQ_OQ), one);
            const Floats sum = _mm512_add_ps(_mm512_mul_ps(total_weight[v], keep[v]), _mm512_mul_ps(weight[v], add[v]));
            total_maximum[v] = choose(v, top, maximum[v], total_maximum[v]);
            total_weight[v] = choose(v, sum, weight[v], total_weight[v]);
        }
    }

    Floats choose(int v, Floats merged, Floats part, Floats total) const {
        return _mm512_mask_mov_ps(_mm512_mask_mov_ps(merged, is_first[v], part), is_blind[v], total);
    }
};

// [rows][words] into [words][rows].
void gather_queries(const Attention& task, int64_t words, float* out) {
    for (int64_t first = 0; first < STRIDE; first += LANES) {
        for (int64_t at = 0; at < words; at += LANES) {
            Floats x[LANES];
            for (int64_t i = 0; i < LANES; ++i) x[i] = first + i < task.rows ? load_some(task.queries[first + i], at, words) : _mm512_setzero_ps();
            transpose(x);
            for (int64_t i = 0; i < std::min(LANES, words - at); ++i) store(out + (at + i) * STRIDE + first, x[i]);
        }
    }
}

// And back: row(i) is where row i goes.
template <class Row> void scatter(const float* from, int64_t rows, int64_t head_dim, Row row) {
    for (int64_t first = 0; first < rows; first += LANES) {
        for (int64_t at = 0; at < head_dim; at += LANES) {
            Floats x[LANES];
            for (int64_t i = 0; i < LANES; ++i) x[i] = load(from + (at + i) * STRIDE + first);
            transpose(x);
            for (int64_t i = 0; i < std::min(LANES, rows - first); ++i) store(row(first + i) + at, x[i]);
        }
    }
}

template <Kv FORMAT> void widen_part(const Part& from, int64_t head_dim, float* out) {
    for (int64_t i = 0; i < from.count; ++i) {
        for (int64_t at = 0; at < head_dim; at += LANES) store(out + i * head_dim + at, widen<FORMAT>(from.vectors[i] + at * KV_BYTES<FORMAT>));
    }
}

// As [token][words], two elements a word.
template <Kv FORMAT> void narrow_part(const Part& from, int64_t head_dim, float* out) {
    for (int64_t i = 0; i < from.count; ++i) {
        const uint8_t* vector = from.vectors[i];
        auto* to = reinterpret_cast<uint16_t*>(out + i * head_dim / 2);
        for (int64_t at = 0; at < head_dim; at += LANES) {
            if constexpr (FORMAT == Kv::BF16) std::memcpy(to + at, vector + at * 2, LANES * 2);
            else store_narrow(to + at, widen<FORMAT>(vector + at * KV_BYTES<FORMAT>));
        }
    }
}

// As [token / 2][head_dim], two tokens a word.
template <Kv FORMAT> void pair_part(const Part& from, int64_t head_dim, float* out) {
    for (int64_t i = 0; i < from.count; i += 2) {
        for (int64_t at = 0; at < head_dim; at += LANES) {
            store(out + i / 2 * head_dim + at, pair_up<FORMAT>(from.vectors[i] + at * KV_BYTES<FORMAT>, from.vectors[i + 1] + at * KV_BYTES<FORMAT>));
        }
    }
}

// `words` a vector: its elements, with DOTS two in one.
template <bool DOTS> INLINE void score_tile(const float* queries, const float* keys, int64_t words, float* scores) {
    Floats sum[TILE_TOKENS][VECTORS];
    for (int i = 0; i < TILE_TOKENS; ++i) for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_setzero_ps();
    const float* from[3] = {keys, keys + 3 * words, keys + 6 * words};  // as in multiply_tile
    for (int64_t at = 0; at < words; ++at) {
        Floats query[VECTORS];
        for (int v = 0; v < VECTORS; ++v) query[v] = load(queries + at * STRIDE + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_TOKENS; ++i) {
            const Floats key = splat(from[i / 3][i % 3 * words + at]);
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = DOTS ? dot(sum[i][v], query[v], key) : fma(query[v], key, sum[i][v]);
        }
    }
    for (int i = 0; i < TILE_TOKENS; ++i) for (int v = 0; v < VECTORS; ++v) store(scores + i * STRIDE + v * LANES, sum[i][v]);
}

// Scores of tokens that a row sees become e^(score - maximum), the others 0; with DOTS in bf16, as [token / 2][rows].
template <bool IS_WHOLE, bool DOTS> INLINE void weigh_vector(Crowd& crowd, int v, const Part& keys, const Part& values, bool has_scales, float* scores) {
    Floats top = splat(-INFINITY), lanes[LANES];
    for (int64_t token = 0; token < keys.count; ++token) {
        float* at = scores + token * STRIDE + v * LANES;
        Floats x = load(at);
        if (has_scales) {
            x = _mm512_mul_ps(x, splat(keys.scales[token]));
            store(at, x);
        }
        top = IS_WHOLE ? _mm512_max_ps(top, x) : _mm512_mask_max_ps(top, crowd.sees(v, token), top, x);
    }
    for (auto& lane : lanes) lane = _mm512_setzero_ps();
    const auto weigh = [&](int64_t token) __attribute__((always_inline)) {
        const Floats below = _mm512_sub_ps(load(scores + token * STRIDE + v * LANES), top);
        Floats x = DOTS ? exponential_to_round(below) : exponential(below);
        const __mmask16 sees = IS_WHOLE ? __mmask16(-1) : crowd.sees(v, token);
        if (!IS_WHOLE) x = _mm512_maskz_mov_ps(sees, x);
        lanes[token % LANES] = _mm512_add_ps(lanes[token % LANES], x);
        return has_scales ? _mm512_maskz_mul_ps(sees, x, splat(values.scales[token])) : x;
    };
    for (int64_t token = 0; token < keys.count; token += WORD_ELEMENTS<DOTS>) {
        float* to = scores + token / WORD_ELEMENTS<DOTS> * STRIDE + v * LANES;
        const Floats x = weigh(token);
        if constexpr (DOTS) store(to, narrow_pairs(x, token + 1 < keys.count ? weigh(token + 1) : _mm512_setzero_ps()));
        else store(to, x);
    }
    for (int64_t half = LANES / 2; half > 0; half /= 2) {  // the order of `sum`
        for (int64_t i = 0; i < half; ++i) lanes[i] = _mm512_add_ps(lanes[i], lanes[i + half]);
    }
    crowd.maximum[v] = top, crowd.weight[v] = lanes[0];
}

template <bool DOTS> void weigh(Crowd& crowd, const Part& keys, const Part& values, bool has_scales, float* scores) {
    for (int v = 0; v < VECTORS; ++v) {
        if (crowd.sees_all) weigh_vector<true, DOTS>(crowd, v, keys, values, has_scales, scores);
        else weigh_vector<false, DOTS>(crowd, v, keys, values, has_scales, scores);
    }
}

// A row takes only values that it may see, as in attend_few.h: of the tokens up to `common` every row, of those up to `end` some.
// emit(element, vector, sum).
template <class Emit>
INLINE void mix_tile(const Crowd& crowd, const float* values, int64_t head_dim, int64_t common, int64_t end, const float* scores, Emit emit) {
    Floats sum[TILE_DIMS][VECTORS], weight[VECTORS];
    for (int i = 0; i < TILE_DIMS; ++i) for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_setzero_ps();
    int64_t token = 0;
    for (; token < common; ++token) {
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(scores + token * STRIDE + v * LANES);
        for (int i = 0; i < TILE_DIMS; ++i) {
            const Floats value = splat(values[token * head_dim + i]);
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = fma(weight[v], value, sum[i][v]);
        }
    }
    for (; token < end; ++token) {
        for (int v = 0; v < VECTORS; ++v) {
            const __mmask16 sees = crowd.sees_before(v, token);
            weight[v] = load(scores + token * STRIDE + v * LANES);
            for (int i = 0; i < TILE_DIMS; ++i) sum[i][v] = _mm512_mask3_fmadd_ps(weight[v], splat(values[token * head_dim + i]), sum[i][v], sees);
        }
    }
    for (int i = 0; i < TILE_DIMS; ++i) for (int v = 0; v < VECTORS; ++v) emit(i, v, sum[i][v]);
}

// The same with two tokens at a time.
template <class Emit>
INLINE void mix_tile_pairs(const Crowd& crowd, const float* values, int64_t head_dim, int64_t common, int64_t end, const float* scores, Emit emit) {
    Floats sum[TILE_DIMS][VECTORS], weight[VECTORS];
    for (int i = 0; i < TILE_DIMS; ++i) for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_setzero_ps();
    int64_t token = 0;
    for (; token + 1 < common; token += 2) {
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(scores + token / 2 * STRIDE + v * LANES);
        for (int i = 0; i < TILE_DIMS; ++i) {
            const Floats value = splat(values[token / 2 * head_dim + i]);
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = dot(sum[i][v], weight[v], value);
        }
    }
    const Floats first_alone = _mm512_castsi512_ps(_mm512_set1_epi32(0xFFFF));
    for (; token < end; token += 2) {
        for (int v = 0; v < VECTORS; ++v) {
            const __mmask16 both = crowd.sees_before(v, token + 1), first = __mmask16(crowd.sees_before(v, token) & ~both);
            weight[v] = load(scores + token / 2 * STRIDE + v * LANES);
            for (int i = 0; i < TILE_DIMS; ++i) {
                const Floats value = splat(values[token / 2 * head_dim + i]);
                sum[i][v] = dot_some(sum[i][v], both, weight[v], value);
                sum[i][v] = dot_some(sum[i][v], first, weight[v], _mm512_and_ps(value, first_alone));
            }
        }
    }
    for (int i = 0; i < TILE_DIMS; ++i) for (int v = 0; v < VECTORS; ++v) emit(i, v, sum[i][v]);
}

template <bool DOTS> void mix_many(const Attention& task, const Crowd& crowd, int64_t begin, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim, common = task.seen(0, begin), end = task.seen(task.rows - 1, begin);
    for (int64_t at = 0; at < head_dim; at += TILE_DIMS) {
        float *mixed = scratch.mixed + at * STRIDE, *totals = scratch.totals + at * STRIDE;
        const auto emit = [&](int i, int v, Floats sum) __attribute__((always_inline)) {
            const int64_t to = i * STRIDE + v * LANES;
            if (task.partials) return store(mixed + to, sum);
            const Floats total = load(totals + to), merged = fma(sum, crowd.add[v], _mm512_mul_ps(total, crowd.keep[v]));
            store(totals + to, crowd.is_plain ? merged : crowd.choose(v, merged, sum, total));
        };
        if constexpr (DOTS) mix_tile_pairs(crowd, scratch.values + at, head_dim, common, end, scratch.scores, emit);
        else mix_tile(crowd, scratch.values + at, head_dim, common, end, scratch.scores, emit);
    }
}

template <Kv FORMAT, bool DOTS> void attend_many(const Attention& task, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim, words = head_dim / WORD_ELEMENTS<DOTS>;
    Crowd crowd;
    gather_queries(task, words, scratch.queries);
    for (int64_t part = task.first_part; part < task.end_part; ++part) {
        const int64_t begin = part * PART;
        const Part &keys = scratch.key_part, &values = scratch.value_part;
        task.context.find(KEYS, part, scratch.key_part);
        task.context.find(VALUES, part, scratch.value_part);
        task.fetch_next(part, scratch.fetcher);
        crowd.begin(task, begin);
        if constexpr (DOTS) narrow_part<FORMAT>(keys, head_dim, scratch.keys);
        else widen_part<FORMAT>(keys, head_dim, scratch.keys);
        for (int64_t token = 0; token < keys.count; token += TILE_TOKENS) {
            scratch.fetcher.fetch_run();
            score_tile<DOTS>(scratch.queries, scratch.keys + token * words, words, scratch.scores + token * STRIDE);
        }
        weigh<DOTS>(crowd, keys, values, task.context.pool->is_quantised(), scratch.scores);
        if (!task.partials) crowd.take();
        if constexpr (DOTS) pair_part<FORMAT>(values, head_dim, scratch.values);
        else widen_part<FORMAT>(values, head_dim, scratch.values);
        scratch.fetcher.fetch_runs();
        mix_many<DOTS>(task, crowd, begin, scratch);
        if (!task.partials) continue;
        alignas(64) float maximum[STRIDE], weight[STRIDE];
        for (int v = 0; v < VECTORS; ++v) store(maximum + v * LANES, crowd.maximum[v]), store(weight + v * LANES, crowd.weight[v]);
        for (int64_t row = 0; row < task.rows; ++row) task.partial(part, row)[0] = maximum[row], task.partial(part, row)[1] = weight[row];
        scatter(scratch.mixed, task.rows, head_dim, [&](int64_t row) { return task.partial(part, row) + 2; });
    }
    if (task.partials) return;
    for (int64_t i = 0; i < head_dim * VECTORS; ++i) {
        store(scratch.totals + i * LANES, _mm512_div_ps(load(scratch.totals + i * LANES), crowd.total_weight[i % VECTORS]));
    }
    scatter(scratch.totals, task.rows, head_dim, [&](int64_t row) { return task.results[row]; });
}

}  // namespace
