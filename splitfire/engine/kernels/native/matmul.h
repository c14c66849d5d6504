// Rows of activations times a matrix of weights, in panels of 32 output columns.
//
// A panel holds its columns for all K inputs in the order in which they are read. For each of them a chain of K multiply-adds in
// ascending order, the same for any number of rows; registers hold up to MAX_TILE rows of 32 columns.

#pragma once

#include "simd.h"

namespace {

constexpr int64_t PANEL = 32;      // columns
constexpr int64_t MAX_TILE = 12;   // rows; 24 registers of sums, four of weights and some of activations
constexpr int64_t ROW_BLOCK = 132;  // rows that are multiplied with a panel while it is near; their activations fit the second cache
constexpr int64_t ROW_PADDING = 16;  // floats between rows, so that they do not fall into the same places of the cache

enum class Weight : int64_t { BF16, FP32, INT8 };

// Twin of compiled.py's _Matrix. [columns, inputs], packed by its pack(); a panel that is not full is filled up with zeros.
struct Matrix {
    const uint8_t* panels;
    const float* scales;  // one a column, or null
    const float* bias;    // one a column, or null
    int64_t columns, inputs;
    Weight format;

    int64_t num_panels() const { return (columns + PANEL - 1) / PANEL; }
    int64_t element_bytes() const { return format == Weight::BF16 ? 2 : format == Weight::FP32 ? 4 : 1; }
    int64_t panel_bytes() const { return inputs * PANEL * element_bytes(); }
    const uint8_t* panel(int64_t i) const { return panels + i * panel_bytes(); }
};

// What is fetched towards the processor while a tile is multiplied: `at`, `step` bytes further with every two inputs, and from input `turn` on `then`.
struct Ahead {
    const uint8_t* at;
    int64_t step, turn;
    const uint8_t* then;
};

constexpr int64_t AHEAD_BYTES = 4096;

// K inputs times 32 columns, two inputs at a time: their weights of a column lie side by side in BF16, one after the other else.
template <Weight FORMAT, int ROWS>
INLINE void multiply_tile(const float* x, int64_t stride, const uint8_t* panel, int64_t inputs, float* out, Ahead ahead) {
    Floats sum[ROWS][2];
    for (int row = 0; row < ROWS; ++row) sum[row][0] = sum[row][1] = _mm512_setzero_ps();
    // Three rows share a pointer: the processor adds the stride and its double by itself, and the pointers fit its registers.
    const float* from[(ROWS + 2) / 3];
    for (int i = 0; i < (ROWS + 2) / 3; ++i) from[i] = x + 3 * i * stride;
    const auto add = [&](int64_t k, Floats left, Floats right) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            const Floats factor = splat(from[row / 3][row % 3 * stride + k]);
            sum[row][0] = fma(factor, left, sum[row][0]);
            sum[row][1] = fma(factor, right, sum[row][1]);
        }
    };
    for (int64_t k = 0; k < inputs; k += 2) {
        if (k == ahead.turn) ahead.at = ahead.then;
        _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(ahead.at + 64), _MM_HINT_T0);
        ahead.at += ahead.step;
        if constexpr (FORMAT == Weight::BF16) {
            Floats left[2], right[2];
            split_bf16(_mm512_loadu_si512(panel), left[0], left[1]);
            split_bf16(_mm512_loadu_si512(panel + 64), right[0], right[1]);
            add(0, left[0], right[0]);
            add(1, left[1], right[1]);
            panel += 128;
        } else if constexpr (FORMAT == Weight::FP32) {
            add(0, _mm512_loadu_ps(panel), _mm512_loadu_ps(panel + 64));
            add(1, _mm512_loadu_ps(panel + 128), _mm512_loadu_ps(panel + 192));
            panel += 256;
        } else {
            add(0, widen<Kv::INT8>(panel), widen<Kv::INT8>(panel + 16));
            add(1, widen<Kv::INT8>(panel + 32), widen<Kv::INT8>(panel + 48));
            panel += 64;
        }
#pragma GCC unroll 4
        for (int i = 0; i < (ROWS + 2) / 3; ++i) from[i] += 2;
    }
    for (int row = 0; row < ROWS; ++row) {
        store(out + row * PANEL, sum[row][0]);
        store(out + row * PANEL + LANES, sum[row][1]);
    }
}

template <Weight FORMAT>
void multiply_rows(int64_t rows, const float* x, int64_t stride, const uint8_t* panel, int64_t inputs, float* out, const Ahead& ahead) {
    switch (rows) {
#define CASE(ROWS) case ROWS: return multiply_tile<FORMAT, ROWS>(x, stride, panel, inputs, out, ahead);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

// x [rows, inputs] times panel `panel` of the matrix -> emit(row, sums of 32 columns, scaled, without bias), row by row. Meanwhile panel
// `next` is fetched towards the processor.
template <class Emit>
INLINE void multiply(const Matrix& matrix, int64_t panel, int64_t next, int64_t rows, const float* x, int64_t stride, Emit emit) {
    alignas(64) float out[MAX_TILE * PANEL], scales[PANEL];
    const int64_t first = panel * PANEL, tiles = (rows + MAX_TILE - 1) / MAX_TILE;
    if (matrix.scales) {
        for (int64_t i = 0; i < PANEL; ++i) scales[i] = first + i < matrix.columns ? matrix.scales[first + i] : 0.0f;
    }
    const uint8_t* weights = matrix.panel(panel);
    const int64_t pair_bytes = 2 * PANEL * matrix.element_bytes(), lead = std::min(AHEAD_BYTES, matrix.panel_bytes());
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = rows * tile / tiles, count = rows * (tile + 1) / tiles - begin;
        // One tile: what it will read soon. Several: a share of the next panel, for the first has brought this one near.
        Ahead ahead{weights + lead, pair_bytes, matrix.inputs - lead / pair_bytes * 2, matrix.panel(next)};
        if (tiles > 1) ahead = {matrix.panel(next) + tile * matrix.panel_bytes() / tiles, pair_bytes / tiles, -1, nullptr};
        const float* from = x + begin * stride;
        if (matrix.format == Weight::BF16) multiply_rows<Weight::BF16>(count, from, stride, weights, matrix.inputs, out, ahead);
        else if (matrix.format == Weight::FP32) multiply_rows<Weight::FP32>(count, from, stride, weights, matrix.inputs, out, ahead);
        else multiply_rows<Weight::INT8>(count, from, stride, weights, matrix.inputs, out, ahead);
        for (int64_t row = 0; row < count; ++row) {
            Floats left = load(out + row * PANEL), right = load(out + row * PANEL + LANES);
            if (matrix.scales) left = _mm512_mul_ps(left, load(scales)), right = _mm512_mul_ps(right, load(scales + LANES));
            emit(begin + row, left, right);
        }
    }
}

}  // namespace
