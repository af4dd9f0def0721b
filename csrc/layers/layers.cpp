#include "layers/layers.h"

#include <algorithm>
#include <vector>

#include "kernels/dispatch.h"
#include "common/parallel.h"

namespace repo {
namespace {

constexpr int64_t kBlockRows = 32;  // rows whose part of a weight's gradient is summed first
constexpr int64_t kSpan = 1 << 12;  // elements that a kernel without rows takes at once

// Calls body(first, count) for the spans of [0, count).
template <class Body>
void over_spans(int64_t count, int threads, Body body) {
    const auto range = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) body(i * kSpan, std::min(kSpan, count - i * kSpan));
    };
    parallel_rows((count + kSpan - 1) / kSpan, kSpan, count, threads, range, [] {});
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* y, float* inverse, Shape shape, float epsilon, int threads) {
    const RowKernels& chosen = kernels();
    const int64_t columns = shape.columns;
    const auto range = [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            inverse[r] = chosen.norm(x + r * columns, weight, y + r * columns, columns, epsilon);
    };
    parallel_rows(shape.rows, columns, shape.rows * columns, threads, range, [] {});
}

void rms_norm_gradient(const float* x, const float* weight, const float* inverse, const float* dy, float* dx,
                       float* dweight, Shape shape, int threads) {
    const RowKernels& chosen = kernels();
    const int64_t columns = shape.columns, blocks = (shape.rows + kBlockRows - 1) / kBlockRows;
    std::vector<float> parts(dweight ? blocks * columns : 0);
    const auto range = [&](int64_t first, int64_t last) {
        for (int64_t r = first * kBlockRows; r < std::min(last * kBlockRows, shape.rows); ++r) {
            float* part = dweight ? parts.data() + r / kBlockRows * columns : nullptr;
            const int64_t at = r * columns;
            chosen.norm_gradient(x + at, weight, inverse[r], dy + at, dx + at, part, columns);
        }
    };
    parallel_rows(blocks, kBlockRows * columns, shape.rows * columns, threads, range, [] {});
    if (!dweight) return;
    std::fill_n(dweight, columns, 0.0f);
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = 0; c < columns; ++c) dweight[c] += parts[b * columns + c];
}

void swiglu(const float* gate, const float* up, float* out, int64_t count, int threads) {
    const RowKernels& chosen = kernels();
    over_spans(count, threads, [&](int64_t at, int64_t n) { chosen.swiglu(gate + at, up + at, out + at, n); });
}

void swiglu_gradient(const float* gate, const float* up, const float* grad, float* of_gate, float* of_up, int64_t count,
                     int threads) {
    const RowKernels& chosen = kernels();
    over_spans(count, threads, [&](int64_t at, int64_t n) {
        chosen.swiglu_gradient(gate + at, up + at, grad + at, of_gate + at, of_up + at, n);
    });
}

void rotate(const Heads<const float>& x, const Heads<const float>& cos, const Heads<const float>& sin,
            const Heads<float>& y, bool back, int threads) {
    const RowKernels& chosen = kernels();
    const auto range = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t b = i / x.tokens, t = i % x.tokens;
            for (int64_t h = 0; h < x.heads; ++h)
                chosen.rotate(x.row(b, h, t), cos.row(b, 0, t), sin.row(b, 0, t), y.row(b, h, t), x.columns / 2, back);
        }
    };
    const int64_t width = x.heads * x.columns, rows = x.batch * x.tokens;
    parallel_rows(rows, width, rows * width, threads, range, [] {});
}

}  // namespace repo
