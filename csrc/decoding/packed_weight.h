// Weights packed for products with few rows: each is read once, in order, for every sixteen rows.
#pragma once

#include <cstdint>

namespace repo {

// Asks the system for large pages in memory that is not written yet: a step reads a page of 4 KiB in 200 ns, and each
// would interrupt the hardware's fetching ahead.
void ask_for_large_pages(void* memory, int64_t bytes);

// Packs a weight (outputs, depth), contiguous, into `to` (panels, depth, 16).
void pack_weight(const float* weight, int64_t outputs, int64_t depth, float* to, int threads);

// Writes row r of a packed tile, (depth, 16).
void pack_row(const float* x, int64_t depth, float* tiles, int64_t row);

// Writes out (rows, outputs) = x (rows, depth) weight^T + bias; bias may be null. A row's sums do not depend on the other
// rows.
void multiply_packed(const float* x, int64_t rows, int64_t depth, const float* packed, int64_t outputs,
                     const float* bias, float* out, int threads);

}  // namespace repo
