// Attention of many rows: sixteen rows in the lanes, so that nothing is added up across them and no key is turned.

#pragma once

#include "attend.h"

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
        alignas(64) int32_t from[STRIDE] = {}, to[STRIDE] = {};
        for (int64_t row = 0; row < task.rows; ++row) {
            from[row] = int32_t(std::clamp<int64_t>(task.low(row) - begin, 0, PART)), to[row] = int32_t(task.seen(row, begin));
        }
        for (int v = 0; v < VECTORS; ++v) low[v] = _mm512_load_si512(from + v * LANES), seen[v] = _mm512_load_si512(to + v * LANES);
        sees_all = from[task.rows - 1] == 0 && to[0] == task.context.part_size(begin / PART);
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

// [rows][head_dim] into [head_dim][rows].
void gather_queries(const Attention& task, int64_t head_dim, float* out) {
    for (int64_t first = 0; first < STRIDE; first += LANES) {
        for (int64_t at = 0; at < head_dim; at += LANES) {
            Floats x[LANES];
            for (int64_t i = 0; i < LANES; ++i) x[i] = first + i < task.rows ? load(task.queries[first + i] + at) : _mm512_setzero_ps();
            transpose(x);
            for (int64_t i = 0; i < LANES; ++i) store(out + (at + i) * STRIDE + first, x[i]);
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

template <Kv FORMAT> void widen_part(const Part& from, int64_t head_dim, float* out, Fetcher& fetcher) {
    for (int64_t i = 0; i < from.count; ++i) {
        fetcher.fetch(head_dim * KV_BYTES<FORMAT> / 64 + 1);
        for (int64_t at = 0; at < head_dim; at += LANES) store(out + i * head_dim + at, widen<FORMAT>(from.vectors[i] + at * KV_BYTES<FORMAT>));
    }
}

INLINE void score_tile(const float* queries, const float* keys, int64_t head_dim, float* scores) {
    Floats sum[TILE_TOKENS][VECTORS];
    for (int i = 0; i < TILE_TOKENS; ++i) for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_setzero_ps();
    const float* from[3] = {keys, keys + 3 * head_dim, keys + 6 * head_dim};  // as in multiply_tile
    for (int64_t at = 0; at < head_dim; ++at) {
        Floats query[VECTORS];
        for (int v = 0; v < VECTORS; ++v) query[v] = load(queries + at * STRIDE + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_TOKENS; ++i) {
            const Floats key = splat(from[i / 3][i % 3 * head_dim + at]);
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = fma(query[v], key, sum[i][v]);
        }
    }
    for (int i = 0; i < TILE_TOKENS; ++i) for (int v = 0; v < VECTORS; ++v) store(scores + i * STRIDE + v * LANES, sum[i][v]);
}

// Scores of tokens that a row sees become e^(score - maximum), the others 0.
template <bool IS_WHOLE> INLINE void weigh_vector(Crowd& crowd, int v, const Part& keys, const Part& values, bool has_scales, float* scores) {
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
    for (int64_t token = 0; token < keys.count; ++token) {
        float* at = scores + token * STRIDE + v * LANES;
        Floats x = exponential(_mm512_sub_ps(load(at), top));
        if (!IS_WHOLE) x = _mm512_maskz_mov_ps(crowd.sees(v, token), x);
        lanes[token % LANES] = _mm512_add_ps(lanes[token % LANES], x);
        store(at, has_scales ? _mm512_mul_ps(x, splat(values.scales[token])) : x);
    }
    for (int64_t half = LANES / 2; half > 0; half /= 2) {  // the order of `sum`
        for (int64_t i = 0; i < half; ++i) lanes[i] = _mm512_add_ps(lanes[i], lanes[i + half]);
    }
    crowd.maximum[v] = top, crowd.weight[v] = lanes[0];
}

void weigh(Crowd& crowd, const Part& keys, const Part& values, bool has_scales, float* scores) {
    for (int v = 0; v < VECTORS; ++v) {
        if (crowd.sees_all) weigh_vector<true>(crowd, v, keys, values, has_scales, scores);
        else weigh_vector<false>(crowd, v, keys, values, has_scales, scores);
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

void mix_many(const Attention& task, const Crowd& crowd, int64_t begin, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim, common = task.seen(0, begin), end = task.seen(task.rows - 1, begin);
    for (int64_t at = 0; at < head_dim; at += TILE_DIMS) {
        float *mixed = scratch.mixed + at * STRIDE, *totals = scratch.totals + at * STRIDE;
        mix_tile(crowd, scratch.values + at, head_dim, common, end, scratch.scores, [&](int i, int v, Floats sum) __attribute__((always_inline)) {
            const int64_t to = i * STRIDE + v * LANES;
            if (task.partials) return store(mixed + to, sum);
            const Floats total = load(totals + to), merged = fma(sum, crowd.add[v], _mm512_mul_ps(total, crowd.keep[v]));
            store(totals + to, crowd.is_plain ? merged : crowd.choose(v, merged, sum, total));
        });
    }
}

template <Kv FORMAT> void attend_many(const Attention& task, Scratch& scratch) {
    const int64_t head_dim = task.context.pool->head_dim;
    Crowd crowd;
    gather_queries(task, head_dim, scratch.queries);
    for (int64_t part = task.first_part; part < task.end_part; ++part) {
        const int64_t begin = part * PART;
        const Part &keys = scratch.key_part, &values = scratch.value_part;
        task.context.find(KEYS, part, scratch.key_part);
        task.context.find(VALUES, part, scratch.value_part);
        task.fetch_next(part, scratch.fetcher);
        crowd.begin(task, begin);
        widen_part<FORMAT>(keys, head_dim, scratch.keys, scratch.fetcher);
        for (int64_t token = 0; token < keys.count; token += TILE_TOKENS) {
            score_tile(scratch.queries, scratch.keys + token * head_dim, head_dim, scratch.scores + token * STRIDE);
        }
        weigh(crowd, keys, values, task.context.pool->is_quantised(), scratch.scores);
        if (!task.partials) crowd.take();
        widen_part<FORMAT>(values, head_dim, scratch.values, scratch.fetcher);
        mix_many(task, crowd, begin, scratch);
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
