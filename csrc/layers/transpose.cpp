#include "layers/transpose.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/square.h"

namespace repo {
namespace {

constexpr int64_t kTall = 16;         // rows of a piece: they fill a whole cache line of the result
constexpr int64_t kWide = 64;         // columns of a piece
constexpr int64_t kNear = kWide + 4;  // row stride of the copy of a piece
constexpr int64_t kPanel = 1024;      // columns that a thread takes at once: a page of each row, read in order
constexpr int64_t kPerLine = 16;      // floats

// Transposes height <= kTall rows and width <= kWide columns.
void transpose_edge(const float* from, int64_t stride, float* to, int64_t rows, int64_t height, int64_t width) {
    for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < height; ++r) to[c * rows + r] = from[r * stride + c];
}

// Transposes kTall rows and kWide columns from a copy: rows that are a multiple of 4096 bytes apart would evict each
// other from the L1 cache. The next columns of each row are fetched meanwhile.
void transpose_piece(const float* from, int64_t stride, float* to, int64_t rows) {
    alignas(64) float near[kTall * kNear];
    for (int64_t r = 0; r < kTall; ++r) {
        const float* row = from + r * stride;
        for (int64_t c = 0; c < kWide; c += kPerLine) __builtin_prefetch(row + 2 * kWide + c, 0, 2);
        std::memcpy(near + r * kNear, row, kWide * sizeof(float));
    }
    for (int64_t c = 0; c < kWide; c += 4)
        for (int64_t r = 0; r < kTall; r += 4) transpose_square(near + r * kNear + c, kNear, to + c * rows + r, rows);
}

}  // namespace

void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, int threads) {
    const int64_t share = (columns / std::max(threads, 1) + kWide - 1) / kWide * kWide;
    const int64_t panel = std::clamp(share, kWide, kPanel);
    const auto panels = [&](int64_t first, int64_t last) {
        const int64_t end = std::min(last * panel, columns);
        for (int64_t r = 0; r < rows; r += kTall)
            for (int64_t c = first * panel; c < end; c += kWide) {
                const float* at = from + r * stride + c;
                float* result = to + c * rows + r;
                const int64_t height = std::min(kTall, rows - r), width = std::min(kWide, end - c);
                if (height == kTall && width == kWide)
                    transpose_piece(at, stride, result, rows);
                else
                    transpose_edge(at, stride, result, rows, height, width);
            }
    };
    parallel_rows((columns + panel - 1) / panel, panel * rows, rows * columns, threads, panels, [] {});
}

}  // namespace repo
