// The transposed copy that a GEMM wants of a gradient whose rows are tokens.
#pragma once

#include <cstdint>

namespace repo {

// to (columns, rows), contiguous, from (rows, columns) whose rows are `stride` apart.
void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, int threads);

}  // namespace repo
