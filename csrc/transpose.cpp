#include "transpose.h"

#include <algorithm>

#include "parallel.h"
#include "square.h"

namespace repo {
namespace {

constexpr int64_t kTall = 16;     // rows at once: a whole line of each row of the result
constexpr int64_t kStrip = 64;    // columns that a thread takes at once, and reads in order
constexpr int64_t kPerLine = 16;  // floats

void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

void transpose_edge(const float* from, int64_t stride, float* to, int64_t rows, int64_t height, int64_t width) {
    for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < height; ++r) to[c * rows + r] = from[r * stride + c];
}

// kTall rows of `width` columns; the rows after them, if there are any, are fetched meanwhile.
template <bool kStream>
void transpose_tall(const float* from, int64_t stride, float* to, int64_t rows, int64_t width, bool more) {
    if (more)
        for (int64_t r = kTall; r < 2 * kTall; ++r)
            for (int64_t c = 0; c < width; c += kPerLine) __builtin_prefetch(from + r * stride + c);
    const int64_t whole = width / 4 * 4;
    for (int64_t c = 0; c < whole; c += 4)
        for (int64_t r = 0; r < kTall; r += 4)
            transpose_square<kStream>(from + r * stride + c, stride, to + c * rows + r, rows);
    transpose_edge(from + whole, stride, to + whole * rows, rows, kTall, width - whole);
}

}  // namespace

void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, int threads) {
    // lines that are not written whole would be slower past the caches
    const bool lines = rows % kPerLine == 0 && reinterpret_cast<uintptr_t>(to) % (kPerLine * sizeof(float)) == 0;
    const auto tall = lines ? transpose_tall<true> : transpose_tall<false>;
    const auto strip = [&](int64_t column) {
        const int64_t width = std::min(kStrip, columns - column), whole = rows / kTall * kTall;
        for (int64_t r = 0; r < whole; r += kTall)
            tall(from + r * stride + column, stride, to + column * rows + r, rows, width, r + 2 * kTall <= rows);
        transpose_edge(from + whole * stride + column, stride, to + column * rows + whole, rows, rows - whole, width);
    };
    const auto strips = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) strip(i * kStrip);
    };
    parallel_rows((columns + kStrip - 1) / kStrip, kStrip * rows, rows * columns, threads, strips, finish_streams);
}

}  // namespace repo
