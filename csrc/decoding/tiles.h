// Inputs of products with packed weights, in tiles of sixteen rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/row_kernels.h"

namespace repo {

// Rows of floats or, rounded, of bfloat16, with zeros beyond the last row.
class Tiles {
  public:
    Tiles(int64_t rows, int64_t depth, bool half, const RowKernels& kernels)
        : words_(words_of(depth, half)), half_(half), kernels_(kernels), data_(tiles_of(rows) * kTileRows * words_) {}

    // Words of a row.
    int64_t words() const { return words_; }

    // Writes elements of a row; `first` and `count` are even, in bfloat16 multiples of 16.
    void put(int64_t row, int64_t first, const float* x, int64_t count) {
        float* to = data_.data() + row / kTileRows * kTileRows * words_ + row % kTileRows;
        if (!half_) {
            for (int64_t k = 0; k < count; ++k) to[(first + k) * kTileRows] = x[k];
            return;
        }
        alignas(64) uint16_t rounded[kBlock];
        for (int64_t at = 0; at < count; at += kBlock) {
            const int64_t size = std::min(kBlock, count - at);
            kernels_.round_to_half(x + at, rounded, size);
            float* words = to + (first + at) / 2 * kTileRows;
            for (int64_t k = 0; k < size / 2; ++k) std::memcpy(words + k * kTileRows, rounded + 2 * k, sizeof(float));
        }
    }

    // Multiplies the tile that begins with `row` by a panel with as many words; see RowKernels.
    void multiply(int64_t row, const float* panel, int64_t rows, float* out) const {
        const auto product = half_ ? kernels_.multiply_half_panel : kernels_.multiply_panel;
        product(data_.data() + row * words_, panel, words_, rows, out);
    }

  private:
    static constexpr int64_t kBlock = 256;
    int64_t words_;
    bool half_;
    const RowKernels& kernels_;
    std::vector<float> data_;
};

}  // namespace repo
