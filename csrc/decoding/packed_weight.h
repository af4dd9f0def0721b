// Weights packed for products with few rows: each is read once, in order, for every sixteen rows.
#pragma once

#include <cstdint>

namespace repo {

// Asks the system for large pages in memory that is not written yet: a step reads a page of 4 KiB in 200 ns, and each
// would interrupt the hardware's fetching ahead.
void ask_for_large_pages(void* memory, int64_t bytes);

// Packs a weight (outputs, depth), contiguous, into `to` (panels, words, 16); half: rounded to bfloat16, where depth is a
// multiple of 16.
void pack_weight(const float* weight, int64_t outputs, int64_t depth, float* to, bool half, int threads);

// Writes out (rows, outputs) = x (rows, depth) weight^T + bias; bias may be null. half: of a weight packed in bfloat16, to
// which x is rounded too. A row's sums do not depend on the other rows.
void multiply_packed(const float* x, int64_t rows, int64_t depth, const float* packed, bool half, int64_t outputs,
                     const float* bias, float* out, int threads);

}  // namespace repo
