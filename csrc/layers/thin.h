// Products of the linear losses in which one dimension is the rank of a low-rank weight. They pass over the large matrix
// once, where a GEMM would copy it into blocks first.
#pragma once

#include <cstdint>

namespace repo {

// A matrix of fp32 whose rows are `stride` apart and whose columns are consecutive.
template <class T>
struct Rows {
    T* data;
    int64_t rows, columns, stride;
};

// out (n, m) += z (n, rank) b^T. z, b (m, rank): contiguous.
void add_outer(const Rows<float>& out, const float* z, const float* b, int64_t rank, int threads);

// out (m, rank) += d^T z. d: (n, m); z (n, rank), out: contiguous.
void add_inner(const Rows<const float>& d, const float* z, int64_t rank, float* out, int threads);

}  // namespace repo
