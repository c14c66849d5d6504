// Causal attention of rows of queries over one sequence's keys and values of one head, straight from the paged pool.
//
// The context is worked off in parts of 64 tokens, cut at absolute positions. A part has its own maximum, sum and weighted values, and parts
// are merged in ascending order (Dao 2023, Milakov and Gimelshein 2018): whoever computes them, and beside whichever other rows. Few rows lie
// beside tokens in the lanes of a register (attend_few.h), many rows fill the lanes themselves (attend_many.h). Both round alike: a score is a
// chain over the elements, the weights of a part are added as lanes are, a weighted value is a chain over the tokens.

#pragma once

#include "simd.h"
#include "vectors.h"

#include <utility>

namespace {

constexpr int64_t PART = 64;      // tokens
constexpr int64_t MAX_ROWS = 48;  // rows of queries that share one reading of the context
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t LEAST_BLOCK = 8;  // tokens of a block; it has a multiple of them
constexpr int64_t TURNED_AT_ONCE = 64;  // elements at most, by attend_few.h

// Twin of compiled.py's _Pool: where the KV of a layer, side and head lies (core/layout.py).
struct Pool {
    uint8_t* raw;
    int64_t block_bytes, block_size, kv_heads, head_dim, scale_offset;
    int64_t format;  // of FORMATS

    uint8_t* elements(int64_t block, int64_t layer, int64_t side, int64_t head, int64_t token) const {
        const int64_t vector = ((layer * 2 + side) * kv_heads + head) * block_size + token;
        return raw + block * block_bytes + vector * vector_bytes();
    }
    uint16_t* scales(int64_t block, int64_t layer, int64_t side, int64_t head, int64_t token) const {
        const int64_t vector = ((layer * 2 + side) * kv_heads + head) * block_size + token;
        return reinterpret_cast<uint16_t*>(raw + block * block_bytes + scale_offset) + vector;
    }
    int64_t vector_bytes() const { return head_dim * FORMATS[format].element_bytes; }
    bool is_quantised() const { return FORMATS[format].has_scales; }
};

// Where the tokens of one part lie, keys or values of one layer and head.
struct Part {
    int64_t count = 0;  // tokens that exist
    const uint8_t* vectors[PART];
    alignas(64) float scales[PART];  // of a quantised pool
};

enum Side : int64_t { KEYS, VALUES };

// The KV of one sequence, layer and head.
struct Context {
    const Pool* pool;
    const int32_t* table;
    int64_t layer, head;
    int64_t tokens;  // that have KV after this step

    int64_t part_size(int64_t part) const { return std::min(PART, tokens - part * PART); }

    // each(token of the part, how many from there lie in one block, that block, the place of the first in it)
    template <class Each> void each_piece(int64_t part, Each each) const {
        for (int64_t i = 0, count = part_size(part); i < count;) {
            const int64_t token = part * PART + i, place = token % pool->block_size, here = std::min(count - i, pool->block_size - place);
            each(i, here, table[token / pool->block_size], place);
            i += here;
        }
    }

    void find(Side side, int64_t index, Part& part) const {
        const int64_t vector_bytes = pool->vector_bytes();
        const float factor = pool->format == int64_t(Kv::E4M3) ? E4M3_FACTOR : 1.0f;
        part.count = part_size(index);
        each_piece(index, [&](int64_t first, int64_t count, int64_t block, int64_t place) {
            const uint8_t* vectors = pool->elements(block, layer, side, head, place);
            for (int64_t i = 0; i < count; ++i) part.vectors[first + i] = vectors + i * vector_bytes;
            if (!pool->is_quantised()) return;
            const uint16_t* scales = pool->scales(block, layer, side, head, place);
            for (int64_t i = 0; i < count; i += LEAST_BLOCK) {
                const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + i)));
                _mm256_storeu_ps(part.scales + first + i, _mm256_mul_ps(wide, _mm256_set1_ps(factor)));
            }
        });
        for (int64_t i = part.count; i < PART; ++i) {  // computed with, and masked
            part.vectors[i] = part.vectors[part.count - 1];
            part.scales[i] = 0.0f;
        }
    }
};

// Fetches a part, a few lines of the cache at a time, while the one before is computed with: memory is slow, and never idle. It gives a
// thread more in several places at a time, so the runs of blocks are fetched side by side.
class Fetcher {
public:
    // Begins anew, with nothing. Runs and lines count in their own ways: what one of them has left, the other would read past its end.
    void clear() { num_runs_ = next_ = offset_ = longest_ = 0; }
    // Begins anew, with the keys and values of a part.
    void begin(const Context& context, int64_t part) {
        const Pool& pool = *context.pool;
        clear();
        for (const Side side : {KEYS, VALUES}) {
            context.each_piece(part, [&](int64_t, int64_t count, int64_t block, int64_t place) {
                const int64_t bytes = count * pool.vector_bytes();
                runs_[num_runs_++] = {pool.elements(block, context.layer, side, context.head, place), bytes};
                longest_ = std::max(longest_, bytes);
            });
        }
    }

    __attribute__((always_inline)) void fetch(int64_t lines) {
        for (; lines > 0 && offset_ < longest_; --lines) {
            const auto& [from, bytes] = runs_[next_];
            if (offset_ < bytes) _mm_prefetch(reinterpret_cast<const char*>(from + offset_), _MM_HINT_T1);
            if (++next_ == num_runs_) next_ = 0, offset_ += 64;
        }
    }
    // One of the runs, and all of it; or what is left of them. For who does not fetch by lines.
    void fetch_run() {
        if (next_ == num_runs_) return;
        const auto& [from, bytes] = runs_[next_++];
        for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T1);
    }
    void fetch_runs() { while (next_ < num_runs_) fetch_run(); }
    void fetch_rest() { fetch(num_runs_ * (longest_ / 64 + 1)); }

private:
    std::pair<const uint8_t*, int64_t> runs_[2 * (PART / LEAST_BLOCK + 1)];
    int64_t num_runs_ = 0, longest_ = 0;
    int64_t next_ = 0, offset_ = 0;  // run and byte
};

// A task: some rows, one head, some parts. Rows are query heads of a group within tokens, that at first_position + row / group.
struct Attention {
    Context context;
    int64_t group;
    int64_t first_position;  // of the first row's token
    int64_t window;          // tokens that a token sees at most
    int64_t rows;
    int64_t first_part, end_part;
    Context after;           // what this thread attends to next, from its part `after_part` on; no pool: nothing
    int64_t after_part;
    float* partials;         // where parts go, row by row, as maximum, weight and weighted values; null: they are merged
    int64_t partial_stride;  // floats
    const float* queries[MAX_ROWS];  // scaled
    float* results[MAX_ROWS];        // of parts that are merged

    int64_t position(int64_t row) const { return first_position + row / group; }
    int64_t low(int64_t row) const { return std::max<int64_t>(0, position(row) - window + 1); }
    // How many tokens of a part that begins at `begin` the row sees at most, from the part's first.
    int64_t seen(int64_t row, int64_t begin) const { return std::clamp<int64_t>(position(row) + 1 - begin, 0, context.part_size(begin / PART)); }
    float* partial(int64_t part, int64_t row) const { return partials + ((part - first_part) * rows + row) * partial_stride; }

    // Of what is read after `part`, if anything is.
    void fetch_next(int64_t part, Fetcher& fetcher) const {
        if (part + 1 < end_part) fetcher.begin(context, part + 1);
        else if (after.pool) fetcher.begin(after, after_part);
        else fetcher.clear();
    }
};

// What one thread needs beside its registers. Few rows: keys [head_dim][PART], scores [rows][PART], mixed [rows][head_dim].
// Many rows: keys and values [PART][head_dim], all else with rows last: queries and mixed and totals [head_dim][rows], scores [PART][rows].
struct Scratch {
    alignas(64) float keys[(MAX_HEAD_DIM + TURNED_AT_ONCE) * PART];
    alignas(64) float values[PART * MAX_HEAD_DIM];
    alignas(64) float scores[MAX_ROWS * PART];
    alignas(64) float queries[MAX_ROWS * MAX_HEAD_DIM];
    alignas(64) float mixed[MAX_ROWS * MAX_HEAD_DIM];
    alignas(64) float totals[MAX_ROWS * MAX_HEAD_DIM];
    Part key_part, value_part;
    Fetcher fetcher;
};

// ---- Parts into one result

struct Merged {  // of a row, over the parts so far
    float maximum = -INFINITY, weight = 0.0f;  // of e^(score - maximum)
};

// A row that saw nothing of a part has no maximum, and if nothing was a NaN no weight either.
INLINE bool is_blind(float maximum, float weight) { return maximum == -INFINITY && !(weight != weight); }

// A part's result goes into the row's.
INLINE void take(float* into, Merged& state, float maximum, float weight, const float* mixed, int64_t head_dim) {
    if (is_blind(maximum, weight)) return;
    if (state.maximum == -INFINITY) {
        std::memcpy(into, mixed, size_t(head_dim) * sizeof(float));
        state = {maximum, weight};
        return;
    }
    const float top = std::max(state.maximum, maximum);  // a NaN of the part is in its weight already
    const float keep = state.maximum == top ? 1.0f : exponential(state.maximum - top);
    const float add = maximum == top ? 1.0f : exponential(maximum - top);
    state = {top, state.weight * keep + weight * add};
    for (int64_t d = 0; d < head_dim; d += LANES) store(into + d, fma(load(mixed + d), splat(add), _mm512_mul_ps(load(into + d), splat(keep))));
}

INLINE void divide_by(float* row, float weight, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += LANES) store(row + d, _mm512_div_ps(load(row + d), splat(weight)));
}

// 16 x 16 numbers of 32 bits, rows into columns.
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

}  // namespace
