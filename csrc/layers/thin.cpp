#include "layers/thin.h"

#include <algorithm>

#include "common/parallel.h"
#include "kernels/dispatch.h"

namespace repo {
namespace {

constexpr int64_t kStrip = 256;  // columns that a thread takes at a time

// Calls body(first column, columns) for the strips of a matrix.
template <class Body>
void over_strips(int64_t rows, int64_t columns, int threads, Body body) {
    const auto range = [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) body(s * kStrip, std::min(kStrip, columns - s * kStrip));
    };
    parallel_rows((columns + kStrip - 1) / kStrip, rows * kStrip, rows * columns, threads, range, [] {});
}

}  // namespace

void add_outer(const Rows<float>& out, const float* z, const float* b, int64_t rank, int threads) {
    const RowKernels& chosen = kernels();
    over_strips(out.rows, out.columns, threads, [&](int64_t at, int64_t columns) {
        chosen.add_outer(out.data + at, out.rows, columns, out.stride, z, b + at * rank, rank);
    });
}

void add_inner(const Rows<const float>& d, const float* z, int64_t rank, float* out, int threads) {
    const RowKernels& chosen = kernels();
    over_strips(d.rows, d.columns, threads, [&](int64_t at, int64_t columns) {
        chosen.add_inner(d.data + at, d.rows, columns, d.stride, z, rank, out + at * rank);
    });
}

}  // namespace repo
