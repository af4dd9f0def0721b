// Decoding: products of a tile of rows with a panel of a weight, and attention of one token to its cache.
#pragma once

#include "kernels/attention_rows.h"
#include "decoding/task.h"

namespace repo::REPO_ISA {

constexpr int kPanelVectors = int(kPanelColumns) / kWidth;
// Rows whose sums fit into registers beside a row of the panel; divides the rows of a tile.
constexpr int kRowsAtOnce = kWidth == 16 ? 16 : kWidth == 8 ? 4 : 2;
constexpr int64_t kFloatsAhead = 1024;  // the hardware does not fetch beyond a page of 4 KiB

template <int M>
inline void multiply_rows_of_tile(const float* tile, const float* panel, int64_t depth, float* out) {
    Vec sums[M][kPanelVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const float *weights = panel + k * kPanelColumns, *x = tile + k * kTileRows;
        __builtin_prefetch(weights + kFloatsAhead);
        Vec row[kPanelVectors];
        for (int j = 0; j < kPanelVectors; ++j) row[j] = load_bits<Vec>(weights + j * kWidth);
        for (int i = 0; i < M; ++i) {
            const Vec factor = broadcast(x[i]);
            for (int j = 0; j < kPanelVectors; ++j) sums[i][j] = multiply_add(factor, row[j], sums[i][j]);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < kPanelVectors; ++j) store_bits(out + i * kPanelColumns + j * kWidth, sums[i][j]);
}

// Writes out (kTileRows, kPanelColumns) = tile^T panel, sums over k in order; rows beyond `rows` have no meaning.
inline void multiply_panel(const float* tile, const float* panel, int64_t depth, int64_t rows, float* out) {
    if constexpr (kRowsAtOnce == kTileRows) {
        if (rows > 12) return multiply_rows_of_tile<16>(tile, panel, depth, out);
        if (rows > 8) return multiply_rows_of_tile<12>(tile, panel, depth, out);
        if (rows > 4) return multiply_rows_of_tile<8>(tile, panel, depth, out);
        multiply_rows_of_tile<4>(tile, panel, depth, out);
    } else {
        for (int64_t i = 0; i < rows; i += kRowsAtOnce)
            multiply_rows_of_tile<kRowsAtOnce>(tile + i, panel, depth, out + i * kPanelColumns);
    }
}

// Writes the attention of one token. scores: queries rows of rounded_up(keys).
inline void attend_one(const NewToken& task, float* scores) {
    const int64_t width = rounded_up(task.keys);
    multiply(task.q, task.columns, 1, task.k, task.capacity, scores, width, task.queries, width, task.columns, false);
    for (int64_t i = 0; i < task.queries; ++i) {
        float *row = scores + i * width, log2_sum;
        for (int64_t j = task.keys; j < width; ++j) row[j] = -__builtin_inff();
        const float sum = exponentials(row, width, task.scale * 1.4426950408889634f, &log2_sum);
        for (int64_t j = 0; j < width; j += kWidth) store_bits(row + j, load_bits<Vec>(row + j) / sum);
    }
    multiply(scores, width, 1, task.v, task.columns, task.out, task.columns, task.queries, task.columns, task.keys,
             false);
}

}  // namespace repo::REPO_ISA
