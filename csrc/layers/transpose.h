// Transposes a gradient whose rows are tokens, as a GEMM needs it.
#pragma once

#include <cstdint>

namespace repo {

// Writes `to` (columns, rows), contiguous, from (rows, columns) whose rows are `stride` apart.
void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, int threads);

}  // namespace repo
