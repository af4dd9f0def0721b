// The rows of a (T, V) or (B, L, V) tensor by flat index.
#pragma once

#include <cstdint>

#include "kernels/row_kernels.h"

namespace repo {

struct Rows {
    char* base;
    DType dtype;
    int64_t count, columns;               // N, V
    int64_t length;                       // L, or T for (T, V): flat row r is b = r / L, t = r % L
    int64_t batch_stride, length_stride;  // bytes

    int64_t item_bytes() const { return dtype == kFloat32 ? 4 : 2; }
    int64_t row_bytes() const { return columns * item_bytes(); }
    void* row(int64_t r) const { return base + r / length * batch_stride + r % length * length_stride; }
};

}  // namespace repo
