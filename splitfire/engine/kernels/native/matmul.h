// Rows of activations times a matrix of weights, in panels of 32 output columns.
//
// A panel holds its columns for all K inputs in the order in which they are read. For each of them a chain of K multiply-adds in
// ascending order, the same for any number of rows; registers hold up to MAX_TILE rows of 32 columns.

#pragma once

#include "simd.h"

namespace {

constexpr int64_t PANEL = 32;      // columns
constexpr int64_t MAX_TILE = 12;   // rows; 24 registers of sums, four of weights and some of activations
constexpr int64_t SOME_ROWS = 24;  // so many at most take a piece of their inputs through several panels while it is near
constexpr int64_t ROW_BLOCK = 132;  // rows that are multiplied with a panel while it is near; their activations fit the second cache
constexpr int64_t ROW_PADDING = 16;  // floats between rows, so that they do not fall into the same places of the cache

// Activations are fp32; with the last two, which lie as BF16 and INT8 do, they are bf16, two inputs of a row in the place of one float.
enum class Weight : int64_t { BF16, FP32, INT8, BF16_DOTS, INT8_DOTS };

constexpr bool is_bf16(Weight format) { return format == Weight::BF16 || format == Weight::BF16_DOTS; }
constexpr bool is_dots(Weight format) { return format == Weight::BF16_DOTS || format == Weight::INT8_DOTS; }
constexpr int64_t element_bytes(Weight format) { return format == Weight::FP32 ? 4 : is_bf16(format) ? 2 : 1; }
constexpr int64_t words_of_pair(Weight format) { return is_dots(format) ? 1 : 2; }  // of two inputs of a row

// Twin of compiled.py's _Matrix. [columns, inputs], packed by its pack(); a panel that is not full is filled up with zeros.
struct Matrix {
    const uint8_t* panels;
    const float* scales;  // one a column, or null
    const float* bias;    // one a column, or null
    int64_t columns, inputs;
    Weight format;

    int64_t num_panels() const { return (columns + PANEL - 1) / PANEL; }
    int64_t pair_bytes() const { return 2 * PANEL * element_bytes(format); }
    int64_t panel_bytes() const { return inputs / 2 * pair_bytes(); }
    const uint8_t* panel(int64_t i) const { return panels + i * panel_bytes(); }
};

// What is fetched towards the processor while a tile is multiplied: `at`, `step` bytes further with every two inputs, and from input `turn` on `then`.
struct Ahead {
    const uint8_t* at;
    int64_t step, turn;
    const uint8_t* then;
};

constexpr int64_t AHEAD_BYTES = 8192;

// Few rows take several panels at once, for memory gives a thread more when it reads in several places; 24 registers of sums at most.
constexpr int64_t panels_at_once(int64_t rows) { return rows <= 3 ? 4 : rows == 4 ? 3 : rows <= 6 ? 2 : 1; }

// Panels that a thread should have, one after another: those at once, or those that share a piece of the inputs.
constexpr int64_t PANELS_IN_TURN = 4, INPUTS_IN_TURN = 192;
constexpr bool is_in_turn(int64_t rows) { return panels_at_once(rows) == 1 && rows <= SOME_ROWS; }
constexpr int64_t panels_together(int64_t rows) { return is_in_turn(rows) ? PANELS_IN_TURN : panels_at_once(rows); }

// Some inputs times 32 columns of each of PANELS panels, added to what `out` has if it `goes_on`, two inputs at a time: their weights of a
// column lie side by side in BF16, one after the other else.
// out: [PANELS][ROWS][PANEL]
template <Weight FORMAT, int ROWS, int PANELS>
INLINE void multiply_tile(const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t inputs, float* out, bool goes_on, Ahead ahead) {
    constexpr int64_t PAIR_BYTES = 2 * PANEL * element_bytes(FORMAT);
    Floats sum[PANELS][ROWS][2];
    for (int i = 0; i < PANELS * ROWS; ++i) {
        for (int half = 0; half < 2; ++half) sum[i / ROWS][i % ROWS][half] = goes_on ? load(out + i * PANEL + half * LANES) : _mm512_setzero_ps();
    }
    // Three rows share a pointer: the processor adds the stride and its double by itself, and the pointers fit its registers.
    const float* from[(ROWS + 2) / 3];
    for (int i = 0; i < (ROWS + 2) / 3; ++i) from[i] = x + 3 * i * stride;
    for (int64_t k = 0; k < inputs; k += 2) {
        if (k == ahead.turn) ahead.at = ahead.then;
#pragma GCC unroll 4
        for (int i = 0; i < PANELS; ++i) {
            const auto add = [&](int64_t k, Floats left, Floats right) __attribute__((always_inline)) {
#pragma GCC unroll 12
                for (int row = 0; row < ROWS; ++row) {
                    const Floats factor = splat(from[row / 3][row % 3 * stride + k]);
                    sum[i][row][0] = fma(factor, left, sum[i][row][0]);
                    sum[i][row][1] = fma(factor, right, sum[i][row][1]);
                }
            };
            const uint8_t* weights = panel + i * panel_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(ahead.at + i * panel_bytes), _MM_HINT_T0);
            if (PAIR_BYTES > 64) _mm_prefetch(reinterpret_cast<const char*>(ahead.at + i * panel_bytes + 64), _MM_HINT_T0);
            if constexpr (is_dots(FORMAT)) {
                Floats left, right;  // int8 has a place in bf16
                if constexpr (FORMAT == Weight::BF16_DOTS) left = _mm512_loadu_ps(weights), right = _mm512_loadu_ps(weights + 64);
                else left = pair_up<Kv::INT8>(weights, weights + 32), right = pair_up<Kv::INT8>(weights + 16, weights + 48);
#pragma GCC unroll 12
                for (int row = 0; row < ROWS; ++row) {
                    const Floats factors = splat(from[row / 3][row % 3 * stride]);
                    sum[i][row][0] = dot(sum[i][row][0], factors, left);
                    sum[i][row][1] = dot(sum[i][row][1], factors, right);
                }
            } else if constexpr (FORMAT == Weight::BF16) {
                Floats left[2], right[2];
                split_bf16(_mm512_loadu_si512(weights), left[0], left[1]);
                split_bf16(_mm512_loadu_si512(weights + 64), right[0], right[1]);
                add(0, left[0], right[0]);
                add(1, left[1], right[1]);
            } else if constexpr (FORMAT == Weight::FP32) {
                add(0, _mm512_loadu_ps(weights), _mm512_loadu_ps(weights + 64));
                add(1, _mm512_loadu_ps(weights + 128), _mm512_loadu_ps(weights + 192));
            } else {
                add(0, widen<Kv::INT8>(weights), widen<Kv::INT8>(weights + 16));
                add(1, widen<Kv::INT8>(weights + 32), widen<Kv::INT8>(weights + 48));
            }
        }
        panel += PAIR_BYTES, ahead.at += ahead.step;
#pragma GCC unroll 4
        for (int i = 0; i < (ROWS + 2) / 3; ++i) from[i] += words_of_pair(FORMAT);
    }
    for (int i = 0; i < PANELS; ++i) {
        for (int row = 0; row < ROWS; ++row) {
            store(out + (i * ROWS + row) * PANEL, sum[i][row][0]);
            store(out + (i * ROWS + row) * PANEL + LANES, sum[i][row][1]);
        }
    }
}

template <Weight FORMAT, int ROWS>
void multiply_panels(int64_t panels, const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t inputs, float* out, bool goes_on, const Ahead& ahead) {
    switch (panels) {
#define CASE(PANELS) case PANELS: if constexpr (PANELS <= panels_at_once(ROWS)) multiply_tile<FORMAT, ROWS, PANELS>(x, stride, panel, panel_bytes, inputs, out, goes_on, ahead); return;
        CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
    }
}

template <Weight FORMAT>
void multiply_rows(int64_t rows, int64_t panels, const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t inputs, float* out, bool goes_on, const Ahead& ahead) {
    switch (rows) {
#define CASE(ROWS) case ROWS: return multiply_panels<FORMAT, ROWS>(panels, x, stride, panel, panel_bytes, inputs, out, goes_on, ahead);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

// A piece of a product: some inputs of some panels that lie side by side, and a tile of rows. What is read `after` all tiles is fetched by all of them.
struct Share {
    const uint8_t* after;
    int64_t tile, tiles;
};

INLINE void multiply_piece(const Matrix& matrix, const uint8_t* weights, int64_t panels, int64_t inputs, int64_t rows, const float* x, int64_t stride, float* out, bool goes_on, Share share) {
    const int64_t panel_bytes = matrix.panel_bytes(), pair_bytes = matrix.pair_bytes(), bytes = inputs / 2 * pair_bytes;
    Ahead ahead{share.after + share.tile * bytes / share.tiles, pair_bytes / share.tiles, -1, nullptr};
    if (inputs == matrix.inputs && share.tiles == 1) {  // it goes through memory by itself: what it will read soon
        const int64_t lead = std::min(AHEAD_BYTES, bytes);
        ahead = {weights + lead, pair_bytes, inputs - lead / pair_bytes * 2, share.after};
    }
    if (matrix.format == Weight::BF16) multiply_rows<Weight::BF16>(rows, panels, x, stride, weights, panel_bytes, inputs, out, goes_on, ahead);
    else if (matrix.format == Weight::FP32) multiply_rows<Weight::FP32>(rows, panels, x, stride, weights, panel_bytes, inputs, out, goes_on, ahead);
    else if (matrix.format == Weight::INT8) multiply_rows<Weight::INT8>(rows, panels, x, stride, weights, panel_bytes, inputs, out, goes_on, ahead);
    else if constexpr (HAS_BF16_UNITS) {
        if (matrix.format == Weight::BF16_DOTS) multiply_rows<Weight::BF16_DOTS>(rows, panels, x, stride, weights, panel_bytes, inputs, out, goes_on, ahead);
        else multiply_rows<Weight::INT8_DOTS>(rows, panels, x, stride, weights, panel_bytes, inputs, out, goes_on, ahead);
    }
}

// x [rows, inputs], `stride` words of 32 bits from row to row, times panels [first, end) of the matrix -> emit(panel, row, sums of 32 columns, scaled, without bias), panel by panel.
// Meanwhile what is read after them, at `next`, is fetched towards the processor.
template <class Emit>
INLINE void multiply(const Matrix& matrix, int64_t first, int64_t end, const uint8_t* next, int64_t rows, const float* x, int64_t stride, Emit emit) {
    alignas(64) float sums[PANELS_IN_TURN * SOME_ROWS * PANEL];  // [panel][row][PANEL]
    const int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE, sets = rows <= SOME_ROWS ? 1 : tiles;  // of rows whose sums are kept together
    const int64_t at_once = panels_at_once(rows), in_turn = is_in_turn(rows) ? INPUTS_IN_TURN : matrix.inputs;
    const int64_t pair_bytes = matrix.pair_bytes(), pair_words = words_of_pair(matrix.format);
    const auto at = [&](int64_t panel, int64_t input) { return matrix.panel(panel) + input / 2 * pair_bytes; };
    for (int64_t panel = first, panels; panel < end; panel += panels) {
        panels = std::min(panels_together(rows), end - panel);
        for (int64_t set = 0; set < sets; ++set) {
            const int64_t begin = rows * set / sets, count = rows * (set + 1) / sets - begin;
            for (int64_t k = 0, inputs; k < matrix.inputs; k += inputs) {
                inputs = std::min(in_turn, matrix.inputs - k);
                for (int64_t i = 0; i < panels; i += at_once) {
                    const uint8_t* after = i + at_once < panels ? at(panel + i + at_once, k) : k + inputs < matrix.inputs ? at(panel, k + inputs)
                                         : panel + panels < end ? at(panel + panels, 0) : next;
                    for (int64_t tile = tiles * set / sets; tile < tiles * (set + 1) / sets; ++tile) {
                        const int64_t row = rows * tile / tiles, here = rows * (tile + 1) / tiles - row;
                        multiply_piece(matrix, at(panel + i, k), std::min(at_once, panels - i), inputs, here, x + row * stride + k / 2 * pair_words, stride,
                                       sums + (i * count + row - begin) * PANEL, k > 0, {after, tile, tiles});
                    }
                }
            }
            for (int64_t i = 0; i < panels; ++i) {
                const int64_t column = (panel + i) * PANEL;
                const Floats one = splat(1.0f);
                const Floats left_scale = matrix.scales ? load_some(matrix.scales, column, matrix.columns) : one;
                const Floats right_scale = matrix.scales ? load_some(matrix.scales, column + LANES, matrix.columns) : one;
                for (int64_t row = 0; row < count; ++row) {
                    const float* from = sums + (i * count + row) * PANEL;
                    emit(panel + i, begin + row, _mm512_mul_ps(load(from), left_scale), _mm512_mul_ps(load(from + LANES), right_scale));
                }
            }
        }
    }
}

}  // namespace
