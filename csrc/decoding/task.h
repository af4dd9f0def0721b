// The work of the kernels of decoding: products of a few rows with a packed weight, and attention of one new token.
#pragma once

#include <cstdint>

namespace repo {

// A weight (n, k) is packed as (panels, k, kPanelColumns): panel p has the outputs from p * kPanelColumns on, with zeros
// beyond the last. Inputs are packed as tiles (k, kTileRows), with zeros beyond the last row. In bfloat16 k / 2 words take
// the place of k floats: each holds two neighbours of a row, the first in its lower half.
constexpr int64_t kPanelColumns = 16;
constexpr int64_t kTileRows = 16;

constexpr int64_t panels_of(int64_t outputs) { return (outputs + kPanelColumns - 1) / kPanelColumns; }
constexpr int64_t words_of(int64_t depth, bool half) { return half ? depth / 2 : depth; }
constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// One row and one key head: the queries of the heads that share it, (queries, columns), see all `keys` keys. The cache
// holds keys as (columns, capacity) and values as (capacity, columns); capacity is a multiple of 16.
struct NewToken {
    int64_t queries, keys, columns, capacity;
    float scale;
    const float *q, *k, *v;
    float* out;
};

}  // namespace repo
