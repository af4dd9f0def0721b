#include "transpose.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace repo {
namespace {

constexpr int64_t kTile = 8;
constexpr int64_t kStrip = 64;  // columns that a thread takes at once: whole lines of each row, which are then prefetched

typedef float Four __attribute__((vector_size(16)));

inline Four load(const float* from) {
    Four v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void transpose_square(const float* from, int64_t stride, float* to, int64_t rows) {
    const Four a = load(from), b = load(from + stride), c = load(from + 2 * stride), d = load(from + 3 * stride);
    for (int i = 0; i < 4; ++i) {
        const Four column = {a[i], b[i], c[i], d[i]};
        std::memcpy(to + i * rows, &column, sizeof column);
    }
}

inline void transpose_tile(const float* from, int64_t stride, float* to, int64_t rows) {
    for (int64_t c = 0; c < kTile; c += 4)
        for (int64_t r = 0; r < kTile; r += 4) transpose_square(from + r * stride + c, stride, to + c * rows + r, rows);
}

void transpose_edge(const float* from, int64_t stride, float* to, int64_t rows, int64_t height, int64_t width) {
    for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < height; ++r) to[c * rows + r] = from[r * stride + c];
}

}  // namespace

void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, int threads) {
    const auto tile = [&](int64_t r, int64_t c) {
        const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, columns - c);
        const float* corner = from + r * stride + c;
        if (height == kTile && width == kTile) transpose_tile(corner, stride, to + c * rows + r, rows);
        else transpose_edge(corner, stride, to + c * rows + r, rows, height, width);
    };
    const auto strips = [&](int64_t first, int64_t last) {
        for (int64_t strip = first * kStrip; strip < std::min(last * kStrip, columns); strip += kStrip)
            for (int64_t r = 0; r < rows; r += kTile)
                for (int64_t c = strip; c < std::min(strip + kStrip, columns); c += kTile) tile(r, c);
    };
    parallel_rows((columns + kStrip - 1) / kStrip, kStrip * rows, rows * columns, threads, strips, [] {});
}

}  // namespace repo
